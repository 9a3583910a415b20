"""Claim: gradients that are written over what the backward pass formed for itself and reads no more are the same bits
as beside what was kept, in the calls that a plan replays too; in pieces of the batch but for the sum of a bias, which
is added in another order."""

import pytest
import torch

import macaron_ops
from macaron_ops.kernels.device import recording
from macaron_ops.ops import run
from tests.ops.cases import CASES, DROPOUT, Case, _attend, _ffn, build

core = pytest.importorskip("macaron_ops.kernels.attention_core")

TRITON = macaron_ops.backends()["triton"]
pytestmark = pytest.mark.skipif(not TRITON.usable, reason=f"triton: {TRITON.reason}")
FFN = ("relu", "gelu", "swiglu", "past-a-tile", "dropout")
ATTEND = (
    *("self", "separate", "grouped", "cross-packed", "sequences", "learned-mask", "one-token"),
    *("rotary", "unit-qk"),
)
SHARED = [c for c in CASES if c.name in (ATTEND if c.operator is macaron_ops.attend_step else FFN)]
SHARED = [c for c in SHARED if c.operator in (macaron_ops.attend_step, macaron_ops.ffn_step)]
TILES = [
    Case(macaron_ops.attend_step, "tiles", _attend(32, 2, (4, 70), causal=True)),
    Case(macaron_ops.attend_step, "grouped-tiles", _attend(64, 4, (1, 140), kv_heads=2)),
    Case(macaron_ops.attend_step, "dropout", _attend(24, 3, (2, 7), **DROPOUT)),
    Case(macaron_ops.ffn_step, "tiles", _ffn(272, 136, (140,), activation="geglu")),
    Case(macaron_ops.ffn_step, "parts", _ffn(2048, 64, (2,))),
]
CALLS = [(case, dtype) for case in SHARED for dtype in (torch.float32, torch.bfloat16)]
CALLS += [(case, torch.float32) for case in TILES]
REPLAYED = [case for case in SHARED if case.name in ("self", "gelu")]


def gradients(case, dtype, device, save):
    args, kwargs = build(case, dtype, device)
    given = (*args, *(a for name, a in kwargs.items() if name != "rotary"))
    flat = [t for a in given for t in (a if isinstance(a, tuple) else (a,))]
    wanted = [t.requires_grad_() for t in flat if isinstance(t, torch.Tensor) and t.is_floating_point()]
    with macaron_ops.use_backend("triton"):
        step = macaron_ops.substep(case.operator, *args[1:], **kwargs)
        y = macaron_ops.split_layer(args[0], [step], save=save)
        grad = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y)
        return torch.autograd.grad(y, wanted, grad, allow_unused=True)


def assert_same(kept, again):
    assert len(kept) > 4
    for expected, actual in zip(kept, again, strict=True):
        assert (expected is None and actual is None) or torch.equal(expected, actual)


@pytest.mark.parametrize(("case", "dtype"), CALLS, ids=str)
def test_the_same_bits(case, dtype, device):
    assert_same(*(gradients(case, dtype, device, save) for save in ("fast", "lean")))


@pytest.mark.parametrize("case", REPLAYED, ids=repr)
def test_replays(case, device):
    """The third call of a kind is recorded, the fourth replayed."""
    run.forget()
    kept = gradients(case, torch.float32, device, "fast")
    for _ in range(4):
        assert_same(kept, gradients(case, torch.float32, device, "lean"))


@pytest.mark.parametrize("width", [24, 8320])
def test_the_gradient_of_x_takes_the_place_of_that_of_its_norm(width, device):
    """Where a program has whole rows, and where it walks over them twice in blocks."""
    from macaron_ops.kernels.norm_rows import normalize_rows_backward
    from macaron_ops.kernels.rows import as_rows

    x, dn = torch.randn(5, width, device=device), torch.randn(5, width, device=device)
    apart, _, _ = normalize_rows_backward(as_rows(dn), as_rows(x), "layer", None, 1e-5, total=torch.float32)
    dx, _, _ = normalize_rows_backward(as_rows(dn), as_rows(x), "layer", None, 1e-5, total=torch.float32, in_place=True)
    assert dx.data_ptr() == dn.data_ptr() and torch.equal(dx, apart)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_in_pieces(count, device, monkeypatch):
    """PyTorch's attention in pieces of the batch, whose gradients one kernel each lays where q, k and v were."""
    monkeypatch.setattr("macaron_ops.kernels.attend_step.pieces_of", lambda a, device: count)
    with core.use_core("flash"):
        kept, again = (gradients(TILES[0], torch.bfloat16, device, save) for save in ("fast", "lean"))
    bias = 2  # b_qkv among x and the parameters
    assert kept[bias].dim() == 1
    torch.testing.assert_close(again[bias], kept[bias])
    assert_same([*kept[:bias], *kept[bias + 1 :]], [*again[:bias], *again[bias + 1 :]])


@pytest.mark.parametrize(
    ("shape", "expected"), [((16, 1024), 4), ((4, 1024), 1), ((8, 1024), 2), ((6, 2048), 2), ((5, 4096), 1)]
)
def test_how_many_pieces(shape, expected):
    """Those that divide the batch and fill 132 processors."""
    from macaron_ops.kernels.attention import Attention

    batch, tokens = shape
    a = Attention._make([None] * len(Attention._fields))
    a = a._replace(batch=batch, queries=tokens, keys=tokens, heads=8)
    with recording("sm90", 132):
        assert core.pieces_of(a, torch.device("cpu")) == expected
