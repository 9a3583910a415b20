"""One step of each splitting scheme, its stages sharing one attention and one FFN of full width: fused against eager.

What a scheme costs beside another is its stages (`bench.studies.orders` counts them); what fusing gains is told here.
The studies of the same suite, in `bench.studies`, tell orders and errors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn

from macaron_ops.splitting import CATALOGUE, Scheme

from .. import flops
from ..correctness import Yardstick
from ..eager import EagerSchemeLayer, randomize_
from ..group import EAGER, OURS, Group, Ready, Variant, backend_names, gradients, on_backend
from ..options import DTYPES, Options
from ..presets import PRESETS, Preset

PRESET = "wmt-base"
_SCHEMES = {
    "quick": ("lie_trotter_AB", "strang_BAB", "parallel"),
    "normal": ("lie_trotter_AB", "strang_BAB", "parallel", "sws", "lie_richardson2", "blanes_moan4_BAB"),
    "full": tuple(name for name, scheme in CATALOGUE.items() if scheme.is_real and not scheme.has_commutator),
}


def groups(options: Options) -> list[Group]:
    directions = flops.PASSES if options.effort != "quick" else flops.PASSES[1:]
    return [
        _group(CATALOGUE[name], PRESETS[PRESET], dtype, direction, options)
        for name in _SCHEMES[options.effort]
        for dtype in options.dtypes
        for direction in directions
    ]


def _group(scheme: Scheme, preset: Preset, dtype: str, direction: str, options: Options) -> Group:
    batch, length = preset.size(options.device.type, "quick")  # a scheme has up to 21 stages
    cost = scheme.cost()
    forward = cost.A * flops.attention_flops(batch, length, preset.width)
    forward += cost.B * flops.ffn_flops(batch * length, preset.width, preset.hidden)
    ours = tuple(f"{OURS} {backend}" for backend in backend_names(options, ("ffn_step", "attend_step")))
    return Group(
        suite="schemes",
        subject=scheme.name,
        shape={
            "preset": preset.name,
            "batch": batch,
            "length": length,
            "width": preset.width,
            "hidden": preset.hidden,
            "heads": preset.heads,
            "activation": "gelu",
            "attentions": cost.A,
            "ffns": cost.B,
        },
        dtype=dtype,
        direction=direction,
        tokens=batch * length,
        flops=flops.of_pass(forward, direction),
        denominator=EAGER,
        names=(EAGER, *ours),
        build=partial(_build, scheme, preset, (batch, length), DTYPES[dtype], direction, options),
    )


def _build(
    scheme: Scheme,
    preset: Preset,
    size: tuple[int, int],
    dtype: torch.dtype,
    direction: str,
    options: Options,
    names: Sequence[str],
) -> Iterable[Variant]:
    device = options.device
    generator = torch.Generator(device=device).manual_seed(options.seed)
    x, grad = (torch.randn(*size, preset.width, generator=generator, device=device).to(dtype) for _ in range(2))
    x.requires_grad_(direction != "forward")
    eager = EagerSchemeLayer(preset.width, preset.heads, preset.hidden, "gelu", scheme)
    eager = randomize_(eager, options.seed).to(device, dtype)

    def ready(layer: nn.Module, forward: Callable[[], Tensor], x: Tensor) -> Ready:
        return gradients(forward, (x, *_parameters(layer)), grad.to(x.dtype), direction)

    @cache
    def yardstick() -> Yardstick:
        layer = copy.deepcopy(eager).double()
        x64 = x.detach().double().requires_grad_(x.requires_grad)
        truths = ready(layer, lambda: layer(x64), x64).call()
        found = ready(eager, lambda: eager(x), x).call()
        tensors = ["output", "input gradient", *(f"{name} gradient" for name in _ORDER)]
        return Yardstick.of(tensors[: len(truths)], truths, found)

    def prepare(name: str) -> Ready:
        if name == EAGER:
            return ready(eager, lambda: eager(x), x)
        layer = _fused(scheme, preset, eager)
        return ready(layer, on_backend(name.removeprefix(OURS).strip(), lambda: layer(x)), x)

    for name in names:
        yield Variant(name, partial(prepare, name), lambda found: yardstick().check(found))


# The parameters of the eager layer, and those of the same meaning of SplitLayer's two stages.
_ORDER = {
    "self_attn.in_proj_weight": "stages.0.in_proj.weight",
    "self_attn.in_proj_bias": "stages.0.in_proj.bias",
    "self_attn.out_proj.weight": "stages.0.out_proj.weight",
    "self_attn.out_proj.bias": "stages.0.out_proj.bias",
    "norm1.weight": "stages.0.norm.weight",
    "norm1.bias": "stages.0.norm.bias",
    "linear1.weight": "stages.1.linear1.weight",
    "linear1.bias": "stages.1.linear1.bias",
    "linear2.weight": "stages.1.linear2.weight",
    "linear2.bias": "stages.1.linear2.bias",
    "norm2.weight": "stages.1.norm.weight",
    "norm2.bias": "stages.1.norm.bias",
}


def _parameters(layer: nn.Module) -> list[nn.Parameter]:
    """In one order, whatever the implementation."""
    named = dict(layer.named_parameters())
    return [named[name if name in named else fused] for name, fused in _ORDER.items()]


def _fused(scheme: Scheme, preset: Preset, like: nn.Module) -> nn.Module:
    from macaron_ops.nn import SplitLayer

    parameter = next(like.parameters())
    sizes = (preset.width, preset.heads, preset.hidden)
    layer = SplitLayer(
        *sizes, scheme=scheme, shared=True, activation="gelu", device=parameter.device, dtype=parameter.dtype
    )
    state = like.state_dict()
    layer.load_state_dict({fused: state[name] for name, fused in _ORDER.items()})
    return layer
