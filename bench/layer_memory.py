"""What a training step of a layer takes of a GPU's memory, without a GPU.

    kept   the level after the forward pass, the output included
    peak   the most that the step takes beside its output and gradients: ``activation_bytes`` of ``memory``

Triton's launches are recorded, planned for an H100, and not started, so that tensors of the CPU are allocated and given
back as on the GPU: the bytes are exact, and nobody writes them. The attention is ours. Where the GPU's core is cuDNN's,
its gradients lie apart, and its sums take two matrices like q more: ``pieces_of`` in ``kernels/attention_core.py``.

    TRITON_INTERPRET=1 python -m macaron_ops.bench.layer_memory

prints both in MiB and in matrices of (tokens, D), by which they scale. The variable lets the table of backends choose
Triton without a GPU. ``tests/bench/test_layer_memory.py`` holds the peaks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import memory
from .activations import SAVE
from .eager import SCHEMES
from .presets import GPU_PRESETS, Preset

WARM = 3  # calls before one is weighed: plans are made


class LayerMemory(NamedTuple):
    """In bytes; ``matrix`` is one of (tokens, D)."""

    kept: int
    peak: int
    matrix: int


class _Forgotten(list):
    """Launches that hold none of their tensors."""

    def append(self, launch: object) -> None:
        pass


def layer_memory(preset: Preset, scheme: str, save: str) -> LayerMemory:
    """Of a layer in bfloat16 of the backend ``triton`` on the preset's tokens of a GPU."""
    import macaron_ops
    from macaron_ops.kernels.device import recording

    from .suites.layers import eager_layer, fused_layer

    batch, length = preset.size("cuda", "quick")
    device, dtype = torch.device("cpu"), torch.bfloat16
    layer = fused_layer(preset, scheme, save, eager_layer(preset, scheme, device, dtype, 0))
    x = torch.zeros(batch, length, preset.width, dtype=dtype, requires_grad=True)
    grad, wanted = torch.zeros_like(x), (x, *layer.parameters())

    def step():
        y = layer(x)
        return y, torch.autograd.grad(y, wanted, grad)

    with macaron_ops.use_backend("triton"), recording("sm90", 132, launches=_Forgotten()):
        for _ in range(WARM):
            step()
        found = memory.weigh(step, lambda: layer(x), device)
    return LayerMemory(found["kept_bytes"], found["activation_bytes"], x.numel() * dtype.itemsize)


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'':34} kept, MiB    x (M, D)   peak, MiB    x (M, D)")
    for preset in GPU_PRESETS.values():
        for scheme in SCHEMES:
            for save in SAVE:
                found = layer_memory(preset, scheme, save)
                numbers = (n for part in found[:2] for n in (part / 2**20, part / found.matrix))
                print(f"{preset.name:10} {scheme:12} {save:10}", *(f"{n:11.2f}" for n in numbers))


if __name__ == "__main__":
    main()
