"""Claim: every table of the catalogue meets the order conditions of the order that it states and no higher ones; what a
scheme says of itself (cost, symmetry, adjoint, leading error) follows from its table; what is not consistent is
refused."""

import math

import pytest

from macaron_ops.splitting import CATALOGUE, AffineSplitting, Cost, Splitting, find, register
from macaron_ops.splitting.scheme import merged

SCHEMES = pytest.mark.parametrize("scheme", CATALOGUE.values(), ids=lambda scheme: scheme.name)
COMPOSITIONS = [scheme for scheme in CATALOGUE.values() if isinstance(scheme, Splitting)]
STRANG = find("strang_BAB")


@SCHEMES
def test_order_conditions(scheme):
    assert scheme.residual() <= 1e-14
    assert scheme.residual(scheme.order + 1) > 1e-5
    assert scheme.verify() is scheme
    assert scheme.source


def test_a_wrong_table_is_found_out():
    skew = Splitting("skew", 2, (("B", 0.4), ("A", 1.0), ("B", 0.6)), "none")
    with pytest.raises(ValueError, match="'skew': expected order 2; the condition of the word AB .* its order is 1"):
        skew.verify()
    digits = list(find("mclachlan4").stages)
    digits[0], digits[4] = ("A", digits[0][1] + 1e-12), ("A", digits[4][1] - 1e-12)
    with pytest.raises(ValueError, match="expected order 4"):
        Splitting("digits", 4, digits, "none").verify()


@pytest.mark.parametrize(
    ("name", "measure"),
    # Auzinger, Koch et al.'s LEM; Strang's is sqrt(1/4^2 + 1/2^2).
    [
        ("lie_trotter_AB", 1.0),
        ("strang_BAB", math.sqrt(5) / 4),
        ("mclachlan2_ABA", 0.0513),
        ("yoshida4_ABA", 3.72),
        ("suzuki4_BAB", 0.479),
        ("blanes_moan4_ABA", 0.0136),
        ("blanes_moan6_ABA", 0.0502),
    ],
)
def test_leading_error(name, measure):
    assert find(name).leading_error() == pytest.approx(measure, rel=5e-3)


def test_leading_error_of_a_sum_counts_every_word():
    """Of the unsplit Euler step the words AB and BA are each off by 1/2."""
    assert find("parallel").leading_error() == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("scheme", COMPOSITIONS, ids=lambda scheme: scheme.name)
def test_adjoint_and_swap(scheme):
    assert scheme.adjoint().verify().stages == scheme.stages[::-1]
    assert scheme.swap().verify().swap().stages == scheme.stages
    named_symmetric = scheme.name.startswith(("strang", "mclachlan", "yoshida", "suzuki", "blanes", "complex4", "chin"))
    assert scheme.is_symmetric == named_symmetric
    assert not scheme.is_symmetric or scheme.order % 2 == 0


def test_swap_of_a_sum():
    swapped = find("lie_richardson2").swap()
    assert swapped.verify().terms[1] == (-1.0, (("B", 1.0), ("A", 1.0)))
    assert swapped.swap().terms == find("lie_richardson2").terms
    assert not find("sws").is_symmetric


def test_compose():
    gamma = 1 / (2 - 2 ** (1 / 3))
    jump = STRANG.compose((gamma, 1 - 2 * gamma, gamma), "jump")
    assert (jump.order, jump.name, len(jump.stages)) == (4, "jump", 9)
    assert [o for o, _ in jump.merge().stages] == list("BABABAB")
    assert jump.merge().stages[1][1] == pytest.approx(find("yoshida4_BAB").stages[1][1])
    assert STRANG.compose((0.5, 0.5)).order == 2
    with pytest.raises(ValueError, match="sum to 1; got A: 1.5, B: 1.5"):
        STRANG.compose((0.5, 1.0))


def test_cost():
    assert STRANG.cost() == Cost(A=1, B=2)
    assert STRANG.cost(10) == Cost(A=10, B=20)
    assert STRANG.cost(10, merge=True) == Cost(A=10, B=11)  # first same as last
    assert find("lie_trotter_AB").cost(10, merge=True) == Cost(A=10, B=10)
    assert find("richardson_strang4").cost(10, merge=True) == Cost(A=30, B=50)
    assert find("ak_suzuki3").cost(2, merge=True) == Cost(A=6, B=6)


def test_merging_drops_what_cancels():
    assert merged((("A", 0.5), ("A", -0.5), ("B", 1.0))) == (("B", 1.0),)


def test_a_coefficient_of_zero_is_no_substep():
    scheme = Splitting("padded", 1, (("A", 0.0), ("B", 1.0), ("A", 1.0)), "none")
    assert scheme.stages == (("B", 1.0), ("A", 1.0))
    assert scheme.cost() == Cost(1, 1)


def test_what_goes_backwards():
    backwards = {name for name, scheme in CATALOGUE.items() if not scheme.is_forward}
    assert {"yoshida4_ABA", "ruth3", "pp34_avg4", "blanes_moan6_ABA"} <= backwards
    assert not backwards & {"strang_BAB", "richardson_strang4", "complex4_triple_jump", "chin4A", "mpe6"}
    assert [name for name, scheme in CATALOGUE.items() if not scheme.is_real] == [
        "complex3_strang2",
        "complex4_triple_jump",
    ]


def test_known_by_name(monkeypatch):
    assert all(find(name) is scheme and scheme.name == name for name, scheme in CATALOGUE.items())
    assert [find("strang_BAB").count(o) for o in "AB"] == [1, 2]
    assert [find("parallel").count(o) for o in "AB"] == [1, 1]
    assert find("parallel").increments == (("A", 1.0), ("B", 1.0))
    assert find("sws").increments is None
    monkeypatch.delitem(CATALOGUE, "ruth3")
    one = register(Splitting("mine", 2, (("A", 0.5), ("B", 1.0), ("A", 0.5)), "this test"))
    try:
        assert find("mine") is one is register(one)
        with pytest.raises(ValueError, match="a name that is not taken; got 'mine'"):
            register(Splitting("mine", 1, (("A", 1.0), ("B", 1.0)), "this test"))
        with pytest.raises(ValueError, match="expected order 3"):
            register(Splitting("more", 3, one.stages, "this test"))
        assert "more" not in CATALOGUE
    finally:
        del CATALOGUE["mine"]


def test_refusals():
    with pytest.raises(ValueError, match="scheme: expected one of 'lie_trotter_AB'.*Did you mean 'strang_BAB' or"):
        find("strang_bab")
    for name in (["a"], {}, None, 3):
        with pytest.raises(ValueError, match="scheme: expected one of 'lie_trotter_AB'"):
            find(name)
    with pytest.raises(ValueError, match="sum to 1; got A: 1, B: 0.5"):
        Splitting("short", 1, (("A", 1.0), ("B", 0.5)), "none")
    with pytest.raises(ValueError, match="operators 'A' and 'B'; got 'C'"):
        Splitting("other", 1, (("A", 1.0), ("C", 1.0)), "none")
    with pytest.raises(ValueError, match="finite coefficients; got .*nan"):
        Splitting("nan", 1, (("A", 1.0), ("B", math.nan)), "none")
    with pytest.raises(ValueError, match="weights that sum to 1; got 2"):
        AffineSplitting("heavy", 1, ((1.0, (("A", 1.0),)), (1.0, (("B", 1.0),))), "none")
