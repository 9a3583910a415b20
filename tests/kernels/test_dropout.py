"""Claim: the kernels' dropout masks are those of the definition, bit for bit, in the forward and in the backward pass,
whatever the tile that draws them."""

import pytest
import torch

import macaron_ops

TRITON = macaron_ops.backends()["triton"]
pytestmark = pytest.mark.skipif(not TRITON.usable, reason=f"triton: {TRITON.reason}")


@pytest.mark.parametrize("seed", [11, -1, 2**62 + 12345678901])
@pytest.mark.parametrize("width", [24, 160], ids=["one kernel", "two products"])
def test_masks(width, seed, device):
    """Every number is a small integer or 0 after a dropout: the results of both backends are equal."""
    weight = torch.eye(width, device=device)
    ones = torch.ones(width, device=device)
    leaves = [torch.zeros(70, width, device=device), weight, ones, weight.clone(), ones.clone()]
    grad = torch.randint(-3, 4, (70, width), device=device).float()
    found = []
    for backend in ("triton", "reference"):
        inputs = [t.detach().clone().requires_grad_() for t in leaves]
        with macaron_ops.use_backend(backend):
            y = macaron_ops.ffn_step(
                *inputs, norm=None, activation="relu", step=1.0, dropout=0.5, activation_dropout=0.5, seed=seed
            )
        found.append([y, *torch.autograd.grad(y, inputs, grad)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    dropped = found[0][0] == 0
    assert 0.4 < dropped.double().mean() < 0.6
    assert set(found[0][0].unique().tolist()) == {0.0, 2.0, 6.0}  # dropped; hidden dropped: 2 b_out; else 2 (2 + 1)


def test_streams_of_a_layer(device):
    """A layer draws one seed: each substep has streams of its own, here past 32 bits of the counter's upper word."""
    from macaron_ops.kernels.ffn_step import forward
    from macaron_ops.reference.ffn_step import Options, Tensors
    from macaron_ops.reference.ffn_step import forward as define

    x, w, ones = torch.zeros(5, 8, device=device), torch.eye(8, device=device), torch.ones(8, device=device)
    tensors = Tensors(w, ones, w, None, None, None, torch.tensor(3, device=device))
    for stream in (0, 2, 1026):
        options = Options(None, 0.0, "relu", 1.0, 1.0, "pre", 0.5, 0.5, stream)
        ours, theirs = forward(x, tensors, options, "none")[0], define(x, tensors, options)[0]
        assert torch.equal(ours, theirs)
