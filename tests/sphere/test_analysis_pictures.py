"""Claim: the pictures show the numbers they are given: curves and marks lie where the data are."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("matplotlib")

import macaron_ops
from macaron_ops.sphere import atoms, circle_points, find_critical_points, random_perceptron, uniform
from macaron_ops.sphere.pictures import landscape, layers, look


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def marks(axes):
    """The points of each scatter, by its label."""
    return {
        found.get_label(): torch.tensor(found.get_offsets().tolist(), dtype=torch.float64) for found in axes.collections
    }


@pytest.mark.parametrize("d", [2, 3])
def test_the_potential_with_its_critical_points_and_atoms(d, tmp_path):
    part = random_perceptron(4, d, "tanh", generator=generator(1))
    points = find_critical_points(part, 1, d, starts=16, steps=0, generator=generator())
    cloud = atoms(uniform(3, d, generator=generator(2)), 0.01)
    drawn = landscape.potential(part, points, {"three": cloud})
    axes = drawn.axes[0]
    if d == 2:
        angle, v = (torch.as_tensor(values) for values in axes.lines[0].get_data())
        torch.testing.assert_close(v, part.potential(circle_points(angle)))
    shown = marks(axes)
    assert {point.kind for point in points} <= set(shown)
    for point in points:
        height = part.potential(point.x).item() if d == 2 else math.asin(point.x[0, 2])
        at = torch.tensor([math.atan2(point.x[0, 1], point.x[0, 0]), height], dtype=torch.float64)
        assert (shown[point.kind] - at).norm(dim=-1).min() < 1e-9
    assert len(shown["three"]) == 3
    path = look.save(drawn, tmp_path / "new" / "picture.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_atoms_against_beta():
    clouds = [[atoms(circle_points(torch.tensor(at, dtype=torch.float64)), 0.1)] for at in ([0, 0, 1], [0, 1, 2])]
    drawn = landscape.atoms_against_beta([4.0, 16.0], clouds, {"bound": [0.5, 0.6]})
    at, share, many = ([xy for c in axes.collections for xy in c.get_offsets().tolist()] for axes in drawn.axes)
    torch.testing.assert_close(at, [[4.0, 0.0], [4.0, 1.0], [16.0, 0.0], [16.0, 1.0], [16.0, 2.0]])
    torch.testing.assert_close(share, [[4.0, 2 / 3], [4.0, 1 / 3], *[[16.0, 1 / 3]] * 3])
    assert many == [[4, 2], [16, 3]]
    (line,) = drawn.axes[1].lines
    assert list(line.get_ydata()) == [0.5, 0.6] and line.get_label() == "bound"


@pytest.fixture(scope="module")
def records():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return macaron_ops.record_trajectories(model, torch.randn(3, 6, 8), bins=8, singular_values=2)


def test_histograms(records):
    drawn = layers.histograms(records, columns=2)
    shown = [axes for axes in drawn.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == [record.name for record in records]
    for axes, record in zip(shown, records, strict=True):
        density = torch.as_tensor(axes.patches[1].get_data().values)
        torch.testing.assert_close(density, record.histogram * 4)  # the area of eight bins on [-1, 1] is 1
        assert axes.lines[0].get_xdata()[0] == pytest.approx(record.mean_product.mean().item())


def test_quantities(records):
    rank, groups, energy = layers.quantities(records).axes
    assert list(rank.lines[0].get_ydata()) == pytest.approx([r.effective_rank.mean().item() for r in records])
    assert list(groups.lines[0].get_ydata()) == pytest.approx([r.clusters.double().mean().item() for r in records])
    for line, beta in zip(energy.lines, (1.0, 4.0, 9.0), strict=True):
        assert line.get_label() == f"beta = {beta:g}"
        assert list(line.get_ydata()) == pytest.approx([r.energies[beta].mean().item() for r in records])
    assert [label.get_text() for label in rank.get_xticklabels()] == ["input", "0", "1"]


def test_jacobians(records):
    (axes,) = layers.jacobians(records).axes
    for line, record in zip(axes.lines, records[1:], strict=True):
        assert line.get_label() == record.name
        assert list(line.get_ydata()) == pytest.approx(record.spectrum.values.mean(0).tolist())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: landscape.potential(random_perceptron(2, 4)), "perceptron: expected one on the circle or on S"),
        (lambda r: landscape.atoms_against_beta([1.0], []), "found: expected atoms for each of 1 betas; got 0"),
        (lambda r: landscape.atoms_against_beta([1.0], [[]]), "found: expected atoms for each of 1 betas"),
        (lambda r: layers.histograms([]), "records: expected those of record_trajectories; got none"),
        (lambda r: layers.jacobians([replace(one, spectrum=None) for one in r]), "records: expected some with a spec"),
    ],
)
def test_refusals(call, message, records):
    with pytest.raises(ValueError, match=message):
        call(records)
