"""An nGPT layer beside a pre-norm layer with the same matrices: both causal, rotary, swiglu, ours and eager.

A step of training is forward and backward; that the optimiser's step is followed by a normalisation of the matrices
does not depend on the tokens and is not in it. Speeds are over our own pre-norm layer on the first of the backends:
what the sphere costs. A layer's truth is its eager form in float64. There are no bare products: those of attention are
a square of which a causal layer needs half, and which nothing here stores.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import flops
from ..correctness import Yardstick
from ..eager_decoders import EAGER_DECODERS, Rotary, randomize_
from ..group import COMPILED, EAGER, OURS, Group, Ready, Variant, backend_names, gradients, on_backend
from ..options import DTYPES, Options
from ..presets import NGPT, Preset

PRE_NORM, ON_SPHERE = EAGER_DECODERS
PRESETS = (NGPT,)


def groups(options: Options) -> list[Group]:
    return [
        _group(preset, dtype, direction, options)
        for preset in PRESETS
        for dtype in options.dtypes
        for direction in flops.PASSES
    ]


def _group(preset: Preset, dtype: str, direction: str, options: Options) -> Group:
    batch, length = preset.size(options.device.type, options.effort)
    ours = [f"{OURS} {name}" for name in backend_names(options, ("attend_step", "ffn_step", "normalize_step"))]
    compiled = [COMPILED] if options.compile and options.effort != "quick" else []
    attention = flops.attention_flops(batch, length, preset.width, causal=True)
    forward = attention + flops.ffn_flops(batch * length, preset.width, preset.hidden, gated=True)
    return Group(
        suite="ngpt",
        subject=preset.name,
        shape=preset.shape(batch, length),
        dtype=dtype,
        direction=direction,
        tokens=batch * length,
        flops=flops.of_pass(forward, direction),
        denominator=f"{ours[0]} {PRE_NORM}",
        names=tuple(f"{name} {kind}" for name in (EAGER, *compiled, *ours) for kind in EAGER_DECODERS),
        build=partial(_build, preset, (batch, length), DTYPES[dtype], direction, options),
    )


def _build(
    preset: Preset, size: tuple[int, int], dtype: torch.dtype, direction: str, options: Options, names: Sequence[str]
) -> Iterable[Variant]:
    from macaron_ops.nn.positions import rotary_angles

    device = options.device
    generator = torch.Generator(device=device).manual_seed(options.seed)
    x, grad = (torch.randn(*size, preset.width, generator=generator, device=device) for _ in range(2))
    inputs = {PRE_NORM: x, ON_SPHERE: F.normalize(x, dim=-1)}
    inputs = {kind: x.to(dtype).requires_grad_(direction != "forward") for kind, x in inputs.items()}
    grad = grad.to(dtype)
    rotary = rotary_angles(size[1], preset.width // preset.heads, device=device, dtype=dtype)
    shape = (preset.width, preset.heads, preset.hidden)
    layers = {kind: randomize_(make(*shape), options.seed).to(device, dtype) for kind, make in EAGER_DECODERS.items()}

    def ready(layer: nn.Module, forward: Callable[[], Tensor], x: Tensor, grad: Tensor) -> Ready:
        wrt = (x, *(parameter for _, parameter in sorted(layer.named_parameters())))
        return gradients(forward, wrt, grad, direction)

    def eager(layer: nn.Module, x: Tensor, grad: Tensor, rotary: Rotary) -> Ready:
        return ready(layer, lambda: layer(x, rotary), x, grad)

    @cache
    def yardstick(kind: str) -> Yardstick:
        layer, x, angles = copy.deepcopy(layers[kind]).double(), inputs[kind], tuple(a.double() for a in rotary)
        x64 = x.detach().double().requires_grad_(x.requires_grad)
        # In float64 attention stores its weights: those of one sequence at a time.
        parts = [eager(layer, *one, angles).call() for one in zip(x64.split(1), grad.double().split(1), strict=True)]
        output, *grads = zip(*parts, strict=True)
        truths = [torch.cat(output), *map(torch.cat, grads[:1]), *map(sum, grads[1:])]
        tensors = ["output", "input gradient", *(f"{name} gradient" for name, _ in sorted(layer.named_parameters()))]
        return Yardstick.of(tensors[: len(truths)], truths, eager(layers[kind], x, grad, rotary).call())

    def prepare(implementation: str, kind: str) -> Ready:
        layer, x = layers[kind], inputs[kind]
        if implementation == EAGER:
            return eager(layer, x, grad, rotary)
        if implementation == COMPILED:
            compiled = torch.compile(layer, fullgraph=True, dynamic=False)
            return ready(layer, lambda: compiled(x, rotary), x, grad)
        fused, forward = fused_layer(kind, preset, layer)
        return ready(fused, on_backend(implementation.removeprefix(OURS).strip(), lambda: forward(x, rotary)), x, grad)

    for name in names:
        implementation, kind = name.rsplit(" ", 1)
        check = partial(_check, yardstick, kind, implementation == COMPILED)
        yield Variant(name, partial(prepare, implementation, kind), check)


def fused_layer(kind: str, preset: Preset, like: nn.Module) -> tuple[nn.Module, Callable[[Tensor, Rotary], Tensor]]:
    """What holds the parameters of the eager layer `like`, and the forward on macaron_ops."""
    from macaron_ops import attend_step, ffn_step, split_layer, substep
    from macaron_ops.nn import NGPTLayer

    if kind == ON_SPHERE:
        weight = like.in_proj.weight
        layer = NGPTLayer(preset.width, preset.heads, preset.hidden, device=weight.device, dtype=weight.dtype)
        layer.load_state_dict(like.state_dict())
        return layer, layer

    def forward(x: Tensor, rotary: Rotary) -> Tensor:
        w_qkv, w_out = like.in_proj.weight, like.out_proj.weight
        w_in, w_down = like.linear1.weight, like.linear2.weight
        first, second = ({"norm": "rms", "norm_weight": n.weight, "eps": n.eps} for n in (like.norm1, like.norm2))
        steps = [
            substep(attend_step, w_qkv, None, w_out, None, preset.heads, rotary=rotary, causal=True, **first),
            substep(ffn_step, w_in, None, w_down, None, activation=preset.activation, step=1.0, **second),
        ]
        return split_layer(x, steps)

    return like, forward


def _check(
    yardstick: Callable[[str], Yardstick], kind: str, foreign: bool, found: Sequence[Tensor]
) -> dict[str, object]:
    return yardstick(kind).check(found, foreign=foreign)
