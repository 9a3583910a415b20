"""Claim: gradients that are written over what the backward pass formed for itself and reads no more are the same bits
as beside what was kept, in pieces of the batch too."""

import pytest
import torch

import macaron_ops
from macaron_ops.kernels.device import recording
from tests.ops.cases import CASES, DROPOUT, Case, _attend, _ffn, build

core = pytest.importorskip("macaron_ops.kernels.attention_core")

TRITON = macaron_ops.backends()["triton"]
pytestmark = pytest.mark.skipif(not TRITON.usable, reason=f"triton: {TRITON.reason}")
FFN = ("relu", "gelu", "swiglu", "past-a-tile", "dropout")
ATTEND = ("self", "separate", "grouped", "cross-packed", "sequences", "learned-mask", "one-token")
SHARED = [c for c in CASES if c.name in (ATTEND if c.operator is macaron_ops.attend_step else FFN)]
SHARED = [c for c in SHARED if c.operator in (macaron_ops.attend_step, macaron_ops.ffn_step)]
TILES = [
    Case(macaron_ops.attend_step, "tiles", _attend(32, 2, (4, 70), causal=True)),
    Case(macaron_ops.attend_step, "grouped-tiles", _attend(64, 4, (1, 140), kv_heads=2)),
    Case(macaron_ops.attend_step, "dropout", _attend(24, 3, (2, 7), **DROPOUT)),
    Case(macaron_ops.ffn_step, "tiles", _ffn(272, 136, (140,), activation="geglu")),
]


def gradients(case, dtype, device, save):
    args, kwargs = build(case, dtype, device)
    flat = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, tuple) else (a,))]
    wanted = [t.requires_grad_() for t in flat if isinstance(t, torch.Tensor) and t.is_floating_point()]
    with macaron_ops.use_backend("triton"):
        step = macaron_ops.substep(case.operator, *args[1:], **kwargs)
        y = macaron_ops.split_layer(args[0], [step], save=save)
        grad = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y)
        return torch.autograd.grad(y, wanted, grad, allow_unused=True)


def assert_same(case, dtype, device):
    kept, again = (gradients(case, dtype, device, save) for save in ("fast", "lean"))
    assert len(kept) > 4
    for expected, actual in zip(kept, again, strict=True):
        assert (expected is None and actual is None) or torch.equal(expected, actual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*SHARED, *TILES], ids=repr)
def test_the_same_bits(case, dtype, device):
    assert_same(case, dtype, device)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_in_pieces(count, device, monkeypatch):
    """PyTorch's attention in pieces of the batch, whose gradients one kernel each lays where q, k and v were."""
    monkeypatch.setattr("macaron_ops.kernels.attend_step.pieces_of", lambda a, device: count)
    with core.use_core("flash"):
        assert_same(TILES[0], torch.bfloat16, device)


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
