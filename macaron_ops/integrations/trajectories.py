"""Tokens of a real model as particles on the sphere: what their trajectory through the layers looks like.

A hook on each layer takes what comes in and goes out; each token is divided by its length, and each sequence is a cloud
of particles, its padding left out. What is measured is geometry. Nothing of it is a law for trained models: their
matrices are not the identity, and their energies E_beta rise and fall from layer to layer.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from macaron_ops.ops.checks import number, positive_int

from .calls import arguments, batch_first, real_tokens, slow_path
from .jacobian import Spectrum, jacobian_spectrum
from .layer_record import LayerRecord, measure
from .replace import known_layers

__all__ = ["record_trajectories"]

_LARGEST = 700.0  # exp(beta) is finite
_CACHES = ("past_key_value", "past_key_values", "cache")  # a layer that is called again would add to them


@dataclass(frozen=True)
class _Call:
    """A call of a layer: tokens in and out, ``(B, T, D)``, and what else it was given."""

    name: str
    layer: nn.Module
    x: Tensor
    y: Tensor
    rest: tuple[object, ...]
    kwargs: dict[str, object]
    keyword: str | None  # by which x came
    layout: "_Layout"


class _Layout(NamedTuple):
    """How a layer wants its tokens: ``(T, D)``, or the time first."""

    unbatched: bool
    time_first: bool

    def read(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if self.unbatched else x.transpose(0, 1) if self.time_first else x

    def write(self, x: Tensor) -> Tensor:
        return x.squeeze(0) if self.unbatched else x.transpose(0, 1) if self.time_first else x


def record_trajectories(
    model: nn.Module,
    inputs: Tensor | Sequence[object] | Mapping[str, object],
    *,
    layers: Sequence[nn.Module | str] | None = None,
    tokens: Tensor | None = None,
    betas: Sequence[float] = (1.0, 4.0, 9.0),
    bins: int = 64,
    close: float = 0.9,
    singular_values: int = 0,
    generator: torch.Generator | None = None,
) -> list[LayerRecord]:
    """Runs the model once, in eval mode, and measures the tokens before the first layer and after each one.

    The energies of a trained model need not rise or fall: no monotonicity is claimed, at any beta.

    Example::

        for layer in record_trajectories(model, tokenizer(sentences, padding=True, return_tensors="pt")):
            print(layer.name, layer.mean_product.mean(), layer.effective_rank.mean())

    Args:
        model: left as it is.
        inputs: of its ``forward``: a tensor, positional arguments or keyword arguments.
        layers: modules of the model or their names, which map tokens ``(B, T, D)`` or ``(T, D)`` to tokens (a tuple's
            first is taken); None: the layers that :func:`macaron_ops.replace_layers` knows, replaced or not.
        tokens: ``(B, T)``, True where a token counts; None: the ``attention_mask`` of the inputs if they have one of
            two dimensions, else every token.
        betas: at which the energy is taken, finite and above 0. bins: of the histogram.
        close: the inner product from which on a token belongs to a leader's group.
        singular_values: how many of each layer's Jacobian; 0: none. They take ``3 count + 10`` products with it and
            with its transpose, and never its memory. The cloud's own T D bounds them.
        generator: draws the first vectors of the Jacobians' iterations.

    Returns:
        A record for the input, then one for each call of a layer, in the order of the calls; in float64 on the CPU.

    Raises:
        ValueError: no layer is known, a name is unknown, or an argument does not fit.
        TypeError: an argument is of the wrong kind, or a layer that returns no tokens.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    betas = tuple(number("betas", beta) for beta in betas)
    if any(not 0 < beta <= _LARGEST for beta in betas):
        raise ValueError(f"betas: expected numbers above 0 and at most {_LARGEST:g}; got {betas}")
    if singular_values != 0:
        positive_int("singular_values", singular_values)
    if tokens is not None and not isinstance(tokens, Tensor):
        raise TypeError(f"tokens: expected a tensor (B, T); got {type(tokens).__name__}")
    positive_int("bins", bins)
    number("close", close, minimum=-1.0)
    args, kwargs = arguments(inputs)
    tokens = real_tokens(kwargs) if tokens is None else tokens
    watched = _watched(model, layers)
    with _evaluating(model), slow_path():
        calls = _record(model, watched, args, kwargs)
        if not calls:
            raise ValueError("layers: expected some that the model calls; it called none")
        masks = [_mask(call, tokens) for call in calls]
        for call, mask in zip(calls, masks, strict=True):
            if not (call.x[mask].isfinite().all() and call.y[mask].isfinite().all()):
                raise ValueError(f"inputs: expected ones that keep tokens finite; those of {call.name!r} are not")
        spectra = [
            _spectrum(call, mask, singular_values, generator) if singular_values else None
            for call, mask in zip(calls, masks, strict=True)
        ]
    measured = partial(measure, betas=betas, bins=bins, close=close)
    first = measured("input", type(model).__name__, calls[0].x, masks[0], None)
    return [
        first,
        *(
            measured(call.name, _class(call.layer), call.y, mask, spectrum)
            for call, mask, spectrum in zip(calls, masks, spectra, strict=True)
        ),
    ]


def _spectrum(call: _Call, mask: Tensor, count: int, generator: torch.Generator | None) -> Spectrum:
    """Of the layer as a map of its tokens; its other arguments are those of the call, without a cache."""
    kwargs = {name: None if name in _CACHES else value for name, value in call.kwargs.items()}

    def layer(x: Tensor) -> Tensor:
        x = call.layout.write(x)
        out = call.layer(**{call.keyword: x}, **kwargs) if call.keyword else call.layer(x, *call.rest, **kwargs)
        return call.layout.read(_tokens(call.name, out))

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
        found = jacobian_spectrum(layer, call.x, count, mask=mask.unsqueeze(-1), generator=generator)
    return Spectrum(*(part.cpu() for part in found))


def _record(
    model: nn.Module, watched: Sequence[tuple[str, nn.Module]], args: Sequence[object], kwargs: Mapping[str, object]
) -> list[_Call]:
    calls: list[_Call] = []

    def take(layer: nn.Module, args: tuple, kwargs: dict, out: object, *, name: str) -> None:
        keyword = None if args else next(iter(kwargs), None)
        x = args[0] if args else kwargs.get(keyword)
        x, y = _tokens(name, x), _tokens(name, out)
        layout = _Layout(x.dim() == 2, batch_first(layer, x) is not x)
        others = {key: value for key, value in kwargs.items() if key != keyword}
        calls.append(
            _Call(name, layer, layout.read(x).detach(), layout.read(y).detach(), args[1:], others, keyword, layout)
        )

    with ExitStack() as hooks, torch.no_grad():
        for name, layer in watched:
            hooks.callback(layer.register_forward_hook(partial(take, name=name), with_kwargs=True).remove)
        model(*args, **kwargs)
    return calls


def _tokens(name: str, value: object) -> Tensor:
    """The tokens among what a layer takes or returns."""
    found = value[0] if isinstance(value, (tuple, list)) and value else value
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() not in (2, 3):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"layers: expected layers that map tokens (B, T, D) to tokens; {name} has {got}")
    return found


def _mask(call: _Call, tokens: Tensor | None) -> Tensor:
    """``(B, T)``, which tokens of the call count."""
    shape = tuple(call.x.shape[:2])
    if tokens is None:
        return torch.ones(shape, dtype=torch.bool, device=call.x.device)
    if tuple(tokens.shape) != shape:
        raise ValueError(
            f"tokens: expected shape {shape}, as the tokens of {call.name}; got {tuple(tokens.shape)} "
            "(layers=[...] chooses those of one stack, tokens=... says which count)"
        )
    if not tokens.bool().any(-1).all():
        raise ValueError("tokens: expected at least one that counts in each sequence")
    return tokens.bool().to(call.x.device)


def _watched(model: nn.Module, layers: Sequence[nn.Module | str] | None) -> list[tuple[str, nn.Module]]:
    if layers is None:
        found = known_layers(model)
        if not found:
            raise ValueError("model: expected one with layers of a known family, or layers=[...]; none is known")
        return found
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"layers: expected a list of modules or names; got {type(layers).__name__}")
    names = {module: name for name, module in model.named_modules()}
    modules = dict(model.named_modules())
    found = []
    for layer in layers:
        if isinstance(layer, str):
            if layer not in modules:
                raise ValueError(f"layers: expected names of modules of the model; it has no {layer!r}")
            layer = modules[layer]
        if layer not in names:
            raise ValueError(f"layers: expected modules of the model, or their names; got {type(layer).__name__}")
        found.append((names[layer], layer))
    if not found:
        raise ValueError("layers: expected at least one")
    return found


def _class(layer: nn.Module) -> str:
    return getattr(layer, "replaced_class", type(layer)).__name__


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode; every module has its own mode back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
