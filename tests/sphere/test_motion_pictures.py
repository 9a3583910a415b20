"""Claim: pictures of motions show what was simulated, pages hold it whole, and the commands write both with what the
library finds."""

import json
import re

import pytest
import torch

from macaron_ops import cli
from macaron_ops.sphere import (
    PhaseDiagram,
    SelfAttention,
    Trajectory,
    phase_diagram,
    random_perceptron,
    simulate,
    uniform,
)

pytest.importorskip("matplotlib")
from macaron_ops.sphere.pictures import interactive, motion, phase  # noqa: E402

PNG = b"\x89PNG\r\n"


def moved(d, **options):
    draw = torch.Generator().manual_seed(0)
    field = SelfAttention(2.0) + 2.0 * random_perceptron(3, d, "relu", generator=draw)
    watched = ("drift", "clusters", "masses", "mean_product")
    return field, simulate(field, uniform(7, d, generator=draw), 2.0, 0.1, "strang_BAB", observers=watched, **options)


def test_angles_against_time_and_the_potential_beside_them():
    field, path = moved(2)
    ways, potential = motion.particles(path, field).axes
    assert len(ways.lines) == 7 and len(potential.lines) == 1
    at = torch.tensor(ways.lines[0].get_ydata())
    expected = torch.atan2(path.points[:, 0, 1], path.points[:, 0, 0])
    assert torch.equal(at[~at.isnan()], expected[~at.isnan()])
    assert len(motion.particles(path, SelfAttention(2.0)).axes) == 1


def test_maps_of_s2_at_moments_from_first_to_last():
    field, path = moved(3)
    titles = [axes.get_title(loc="left") for axes in motion.particles(path, field).axes]
    assert titles[0] == "t = 0" and "t = 2" in titles


def test_what_was_observed_is_drawn():
    _, path = moved(3)
    axes = motion.observed(path).axes
    assert [one.get_title(loc="left") for one in axes[:4]] == ["drift", "clusters", "masses", "mean product"]
    assert axes[1].lines[0].get_ydata().tolist() == path.observed["clusters"].tolist()


def test_frames_that_were_not_kept_are_refused():
    field, path = moved(3, keep_points=False)
    for draw in (lambda: motion.particles(path, field), lambda: interactive.sphere_page(path, field, "no.html")):
        with pytest.raises(ValueError, match="path: expected all frames of one cloud on"):
            draw()


def data_of(page):
    text = page.read_text()
    assert not re.search(r"\b(TITLE|ABOUT|SCRIPT|DATA|HEIGHT)\b", text) and "http" not in text.replace("w3.org", "")
    return json.loads(re.search(r"const data = (.*);\n", text)[1])


def test_the_page_of_s2_holds_all_points_and_the_potential(tmp_path):
    field, path = moved(3)
    data = data_of(interactive.sphere_page(path, field, tmp_path / "deep" / "page.html"))
    assert data["times"] == path.times.tolist()
    torch.testing.assert_close(torch.tensor(data["points"], dtype=torch.float64), path.points, rtol=0, atol=1e-4)
    values = [v for _, v in data["potential"]]
    assert min(values) == 0 and max(values) == 1


def test_the_phase_diagrams_picture_and_page(tmp_path):
    diagram = phase_diagram([0.5, 1.0, 8.0], n=5, batch=30, t=12.0)
    axes = phase.phase_diagram(diagram, columns=12).axes[0]
    assert axes.lines[1].get_ydata().tolist() == diagram.orthonormal().tolist()
    data = data_of(interactive.phase_page(diagram, tmp_path / "page.html"))
    assert data["betas"] == [0.5, 1.0, 8.0] and data["exact"] == diagram.orthonormal().tolist()
    expected = diagram.share(data["times"]) * 100
    torch.testing.assert_close(torch.tensor(data["share"], dtype=torch.float64), expected, rtol=0, atol=0.051)


def test_simulate_writes_what_the_library_finds(tmp_path, capsys):
    given = "--particles 6 --beta 3 --neurons 4 --until 1 --seed 5 --weighting unnormalized --descent".split()
    assert cli.main(["sphere", "simulate", *given, "--out", str(tmp_path)]) == cli.FINISHED
    path = Trajectory.load(tmp_path / "simulate.npz")
    assert path.points.shape == (11, 6, 3) and (path.observed["energy"].diff() < 0).all()
    draw = torch.Generator().manual_seed(5)
    field = torch.e**-3.0 * SelfAttention(3.0, weighting="unnormalized")
    field = field + random_perceptron(4, 3, "relu", size=0.15, bias=0.3, generator=draw)
    again = simulate(field, uniform(6, 3, generator=draw), 1.0, 0.1, "strang_BAB", ascent=False)
    torch.testing.assert_close(path.points, again.points, rtol=0, atol=1e-12)
    assert not (tmp_path / "checkpoint.npz").exists()
    printed = capsys.readouterr().out
    for name in ("observed.png", "particles.png", "particles.html"):
        assert f"written: {tmp_path / name}" in printed and (tmp_path / name).stat().st_size > 1000
    assert cli.main(["sphere", "simulate", *given, "--out", str(tmp_path)]) == cli.USAGE


def test_an_interrupted_simulation_goes_on(tmp_path, monkeypatch):
    from macaron_ops.sphere import observers

    given = ["sphere", "simulate", "--particles", "5", "--until", "2", "--out"]
    assert cli.main([*given, str(tmp_path / "whole")]) == cli.FINISHED
    drift, calls = observers.OBSERVERS["drift"], 0

    def drift_once(field, seen):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return drift(field, seen)

    drift_once.__qualname__ = drift.__qualname__
    monkeypatch.setitem(observers.OBSERVERS, "drift", drift_once)
    assert cli.main([*given, str(tmp_path / "cut")]) == cli.INTERRUPTED
    assert (tmp_path / "cut" / "checkpoint.npz").exists()
    assert cli.main([*given, str(tmp_path / "cut")]) == cli.FINISHED
    whole, cut = (Trajectory.load(tmp_path / name / "simulate.npz") for name in ("whole", "cut"))
    assert torch.equal(whole.points, cut.points) and torch.equal(whole.times, cut.times) and calls == 9 + 21 - 8


def test_phase_diagram_writes_what_the_library_finds(tmp_path, capsys):
    given = "--particles 4 --batch 16 --betas 3 --largest 1.5 --until 6".split()
    assert cli.main(["sphere", "phase-diagram", *given, "--out", str(tmp_path)]) == cli.FINISHED
    found = PhaseDiagram.load(tmp_path / "phase_diagram.npz")
    expected = phase_diagram([0.5, 1.0, 1.5], n=4, batch=16, t=6.0)
    assert torch.equal(found.arrivals, expected.arrivals) and torch.equal(found.betas, expected.betas)
    assert (tmp_path / "phase_diagram.png").read_bytes().startswith(PNG)
    assert "3 betas of 16 starts" in capsys.readouterr().out
    assert cli.main(["sphere", "phase-diagram", *given, "--particles", "5", "--out", str(tmp_path)]) == cli.USAGE
    assert "another n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["simulate", "--step", "0"], "step: expected a number above 0"),
        (["simulate", "--scheme", "leapfrog"], "scheme: expected a Runge-Kutta method"),
        (["simulate", "--particles", "0"], "n: expected an integer of at least 1"),
        (["simulate", "--beta", "nan"], "beta: expected a finite number"),
        (["phase-diagram", "--step", "2"], "step: expected at most 1"),
        (["phase-diagram", "--betas", "0"], "--betas: expected an integer of at least 1"),
    ],
)
def test_wrong_input_is_told_in_a_line(given, message, tmp_path, capsys):
    assert cli.main(["sphere", *given, "--out", str(tmp_path)]) == cli.USAGE
    assert message in capsys.readouterr().err
