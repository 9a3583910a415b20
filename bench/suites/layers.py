"""One encoder layer: Lie-Trotter against Strang, eager against torch.compile against every backend of macaron_ops.

All layers of a scheme have the same parameters and input; a scheme's truth is its eager layer in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn

from .. import activations, flops, products
from ..correctness import Yardstick
from ..eager import EAGER_LAYERS, SCHEMES, avoid_kinks_, randomize_
from ..group import COMPILED, EAGER, OURS, PRODUCTS, Group, Ready, Variant, backend_names, gradients, on_backend
from ..options import DTYPES, Options
from ..presets import GPU_PRESETS, PRESETS, Preset

DENOMINATOR = f"{EAGER} Lie-Trotter"

# torch.compile needs up to a minute for each scheme and pass on two cores, so a quick run compiles one preset only.
QUICK_COMPILES = ("wmt-base",)


def groups(options: Options) -> list[Group]:
    presets = [*PRESETS.values(), *(GPU_PRESETS.values() if options.device.type == "cuda" else ())]
    return [
        group(preset, dtype, direction, options)
        for preset in presets
        for dtype in options.dtypes
        for direction in flops.PASSES
    ]


def group(preset: Preset, dtype: str, direction: str, options: Options) -> Group:
    batch, length = preset.size(options.device.type, options.effort)
    forward = flops.layer_flops(batch, length, preset.width, preset.hidden)
    return Group(
        suite="layers",
        subject=preset.name,
        shape=preset.shape(batch, length),
        dtype=dtype,
        direction=direction,
        tokens=batch * length,
        flops=flops.of_pass(forward, direction),
        denominator=DENOMINATOR,
        names=variant_names(preset, direction, options),
        build=partial(_build, preset, (batch, length), DTYPES[dtype], direction, options),
    )


def variant_names(preset: Preset, direction: str, options: Options) -> tuple[str, ...]:
    implementations = [EAGER]
    if options.compile and (options.effort != "quick" or preset.name in QUICK_COMPILES):
        implementations.append(COMPILED)
    ours = [f"{OURS} {backend}" for backend in backend_names(options, ("ffn_step", "attend_step"))]
    implementations += [*ours, *(f"{name} lean" for name in ours)] if direction == "forward+backward" else ours
    return *(f"{implementation} {scheme}" for implementation in implementations for scheme in SCHEMES), PRODUCTS


def eager_layer(preset: Preset, scheme: str, device: torch.device, dtype: torch.dtype, seed: int) -> nn.Module:
    """The eager layer with its random parameters rounded to `dtype`."""
    layer = EAGER_LAYERS[scheme](preset.width, preset.heads, preset.hidden, preset.activation)
    return randomize_(layer, seed).to(device, dtype)


def fused_layer(preset: Preset, scheme: str, save: str, like: nn.Module) -> nn.Module:
    """The layer of macaron_ops with the parameters of the eager layer `like`."""
    from macaron_ops import nn as fused

    layers = {"Lie-Trotter": fused.LieTrotterEncoderLayer, "Strang": fused.MacaronEncoderLayer}
    parameter = next(like.parameters())
    layer = layers[scheme](
        preset.width,
        preset.heads,
        preset.hidden,
        dropout=0.0,
        activation=preset.activation if preset.activation != "silu" else torch.nn.functional.silu,
        batch_first=True,
        norm_first=True,
        save=save,
        device=parameter.device,
        dtype=parameter.dtype,
    )
    layer.load_state_dict(like.state_dict())
    return layer


def make_forward(
    name: str, scheme: str, preset: Preset, layer: nn.Module, x: Tensor
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The named implementation of `layer`, and its forward on x."""
    if name == EAGER:
        return layer, lambda: layer(x)
    if name == COMPILED:
        compiled = torch.compile(layer, fullgraph=True, dynamic=False)
        return layer, lambda: compiled(x)
    backend, *policy = name.removeprefix(OURS).split()
    fused = fused_layer(preset, scheme, policy[0] if policy else "fast", layer)
    return fused, on_backend(backend, lambda: fused(x))


def _build(
    preset: Preset, size: tuple[int, int], dtype: torch.dtype, direction: str, options: Options, names: Sequence[str]
) -> Iterable[Variant]:
    device = options.device
    generator = torch.Generator(device=device).manual_seed(options.seed)
    x, grad = (torch.randn(*size, preset.width, generator=generator, device=device).to(dtype) for _ in range(2))
    x.requires_grad_(direction != "forward")
    eager = {scheme: eager_layer(preset, scheme, device, dtype, options.seed) for scheme in SCHEMES}
    if preset.activation == "relu" and x.requires_grad:
        for layer in eager.values():
            avoid_kinks_(layer, x.detach())

    @cache
    def yardstick(scheme: str) -> Yardstick:
        layer = copy.deepcopy(eager[scheme]).double()
        x64 = x.detach().double().requires_grad_(x.requires_grad)
        truths = ready(layer, lambda: layer(x64), x64).call()
        found = ready(eager[scheme], lambda: eager[scheme](x), x).call()
        tensors = ["output", "input gradient", *(f"{name} gradient" for name, _ in _parameters(layer))]
        return Yardstick.of(tensors[: len(truths)], truths, found)

    def ready(layer: nn.Module, forward: Callable[[], Tensor], x: Tensor) -> Ready:
        wrt = (x, *(parameter for _, parameter in _parameters(layer)))
        return gradients(forward, wrt, grad.to(x.dtype), direction)

    def prepare(implementation: str, scheme: str) -> Ready:
        layer, forward = make_forward(implementation, scheme, preset, eager[scheme], x)
        return ready(layer, forward, x)

    for name in names:
        if name == PRODUCTS:
            yield products.variant(
                products.layer_shapes(*size, preset.width, preset.hidden, preset.heads), direction, dtype, device
            )
            continue
        implementation, scheme = name.rsplit(" ", 1)
        check = partial(_check, yardstick, scheme, implementation == COMPILED)
        keeps = _keeps(preset, size, implementation, scheme, dtype)
        yield Variant(name, partial(prepare, implementation, scheme), check, keeps=keeps)


def _keeps(preset: Preset, size: tuple[int, int], name: str, scheme: str, dtype: torch.dtype) -> int | None:
    """By formula; the reference keeps other things, and which of PyTorch's cores a GPU takes is not known here."""
    backend, *policy = name.removeprefix(OURS).split() if name.startswith(OURS) else ("",)
    if backend not in ("native", "triton"):
        return None
    tokens, save = size[0] * size[1], policy[0] if policy else "fast"
    shape = (preset.width, preset.hidden, preset.heads)
    return activations.kept_bytes(tokens, *shape, scheme, save, dtype.itemsize, backend)


def _check(
    yardstick: Callable[[str], Yardstick], scheme: str, foreign: bool, found: Sequence[Tensor]
) -> dict[str, object]:
    return yardstick(scheme).check(found, foreign=foreign)


def _parameters(layer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """In the same order whatever the implementation: by name."""
    return sorted(layer.named_parameters())
