"""Claim: the phase diagram is what plain PyTorch says of every start; in high dimension it follows the exact curve; a
run goes on where it was interrupted."""

import math

import pytest
import torch

from macaron_ops.bench import eager
from macaron_ops.sphere import PhaseDiagram, phase_diagram, uniform
from macaron_ops.sphere.phase_diagram import PUBLISHED, times_to_cluster


@pytest.mark.parametrize("beta", [-1.0, 0.0, 0.5, 3.0])
@pytest.mark.parametrize("d", [2, 3])
def test_every_start_arrives_when_plain_pytorch_says(d, beta):
    """Though what has clustered is left alone, and most starts are told by one product."""
    x = uniform(6, d, batch=(150,), generator=torch.Generator().manual_seed(1))
    found = times_to_cluster(x, beta, 20.0, 0.1, close=0.99)
    expected = eager.times_to_cluster(x, beta=beta, t=20.0, step=0.1, close=0.99)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert found.unique().numel() > 10


def test_in_high_dimension_it_follows_the_exact_curve():
    """n = 32, d = 4096, small steps: products of random particles are 1/64 or so."""
    diagram = phase_diagram([0.5, 2.0], d=4096, batch=2, t=8.0, step=0.02, every=5, close=0.9)
    exact = diagram.orthonormal()
    assert (diagram.arrivals - exact[:, None]).abs().max() < 0.1 * exact.max()


def test_shares_and_medians():
    diagram = PhaseDiagram(
        torch.tensor([1.0, 2.0], dtype=torch.float64),
        torch.tensor([[1.0, 2.0, 3.0], [2.0, math.inf, math.inf]], dtype=torch.float64),
        {"n": 2, "close": 0.9},
    )
    assert diagram.share([0.5, 2.0, 9.0]).flatten().tolist() == pytest.approx([0, 2 / 3, 1, 0, 1 / 3, 1 / 3])
    assert diagram.median().tolist() == [2.0, math.inf]


def test_an_interrupted_diagram_goes_on_and_another_is_refused(tmp_path, monkeypatch):
    import sys

    module = sys.modules["macaron_ops.sphere.phase_diagram"]
    given = {"n": 4, "batch": 20, "t": 5.0, "checkpoint": tmp_path / "diagram.npz"}
    whole = phase_diagram([0.5, 1.0, 2.0], **{**given, "checkpoint": None})
    done = []

    def interrupts(x0, beta, *others, **options):
        if beta == 2.0 and len(done) < 3:
            done.append("interrupted")
            raise KeyboardInterrupt
        done.append(beta)
        return times_to_cluster(x0, beta, *others, **options)

    monkeypatch.setattr(module, "times_to_cluster", interrupts)
    with pytest.raises(KeyboardInterrupt):
        phase_diagram([0.5, 1.0, 2.0], **given)
    again = phase_diagram([0.5, 1.0, 2.0], **given)
    assert done == [0.5, 1.0, "interrupted", 2.0]
    assert torch.equal(again.arrivals, whole.arrivals)
    loaded = PhaseDiagram.load(given["checkpoint"])
    assert torch.equal(loaded.arrivals, whole.arrivals) and loaded.meta == whole.meta
    with pytest.raises(ValueError, match="checkpoint: .* another n; remove it"):
        phase_diagram([0.5], **{**given, "n": 5})


def test_the_published_setting():
    assert len(PUBLISHED["betas"]) == 90 and PUBLISHED["betas"][-1] == 9.0 and PUBLISHED["batch"] == 2048


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"betas": []}, "betas: expected at least one"),
        ({"betas": [math.nan]}, "betas: expected a finite number"),
        ({"step": 1.5}, "step: expected at most 1"),
        ({"step": 0.0}, "step: expected a number above 0"),
        ({"n": 0}, "n: expected an integer of at least 1"),
        ({"close": 1.0}, "close: expected a number between 0 and 1"),
        ({"t": -1.0}, "t: expected a number above 0"),
    ],
)
def test_wrong_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        phase_diagram(**{"betas": [1.0], "n": 3, "batch": 2, "t": 1.0, **change})
