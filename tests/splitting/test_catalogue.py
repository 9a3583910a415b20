"""Claim: every scheme of the catalogue is consistent and has the order that it states, and what is not is refused."""

import pytest
import torch

from macaron_ops.splitting import CATALOGUE, AffineSplitting, Splitting, find


def step(scheme, flows, h):
    """One step on a linear problem, as a matrix: exact substeps, in applied order."""
    terms = scheme.terms if isinstance(scheme, AffineSplitting) else ((1.0, scheme.stages),)
    total = torch.zeros_like(flows["A"])
    for weight, stages in terms:
        product = torch.eye(len(total), dtype=total.dtype)
        for operator, coefficient in stages:
            product = torch.linalg.matrix_exp(coefficient * h * flows[operator]) @ product
        total += weight * product
    return total


def local_order(scheme):
    """p of the local error O(h^(p+1)), from halving h, on matrices that do not commute."""
    flows = {o: torch.randn(4, 4, dtype=torch.float64) / 2 for o in "AB"}
    hs = [2.0**-k for k in range(4, 9)]
    errors = [(step(scheme, flows, h) - torch.linalg.matrix_exp(h * (flows["A"] + flows["B"]))).norm() for h in hs]
    slope = torch.linalg.lstsq(
        torch.stack([torch.tensor(hs).log(), torch.ones(len(hs))], 1), torch.stack(errors).log().float()[:, None]
    ).solution[0]
    return slope.item() - 1


@pytest.mark.parametrize("scheme", CATALOGUE.values(), ids=lambda s: s.name)
def test_order(scheme):
    assert abs(local_order(scheme) - scheme.order) < 0.1
    assert scheme.source


def test_order_of_a_wrong_table():
    """The measurement can fail: Strang with its halves unequal is of order 1."""
    assert local_order(Splitting("skew", 2, (("B", 0.4), ("A", 1.0), ("B", 0.6)), "none")) < 1.2


def test_known_by_name():
    assert all(find(name) is scheme and scheme.name == name for name, scheme in CATALOGUE.items())
    assert [find("strang_BAB").count(o) for o in "AB"] == [1, 2]
    assert [find("parallel").count(o) for o in "AB"] == [1, 1]
    assert find("parallel").increments == (("A", 1.0), ("B", 1.0))


def test_refusals():
    with pytest.raises(ValueError, match="scheme: expected one of 'lie_trotter_AB'.*Did you mean 'strang_BAB'"):
        find("strang_bab")
    for name in (["a"], {}, None, 3):
        with pytest.raises(ValueError, match="scheme: expected one of 'lie_trotter_AB'"):
            find(name)
    with pytest.raises(ValueError, match="sum to 1; got A: 1, B: 0.5"):
        Splitting("short", 1, (("A", 1.0), ("B", 0.5)), "none")
    with pytest.raises(ValueError, match="operators 'A' and 'B'; got 'C'"):
        Splitting("other", 1, (("A", 1.0), ("C", 1.0)), "none")
    with pytest.raises(ValueError, match="weights that sum to 1; got 2"):
        AffineSplitting("heavy", 1, ((1.0, (("A", 1.0),)), (1.0, (("B", 1.0),))), "none")


def test_only_sums_of_single_stages_are_increments():
    halves = tuple((0.5, (("A", 1.0), ("B", 1.0))) for _ in range(2))
    assert AffineSplitting("mean", 1, halves, "none").increments is None
