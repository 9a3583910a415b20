"""How far the layers of a real model are from the flow that they split.

A residual sublayer is a map ``S_i`` of x, and ``F_i(x) = S_i(x) - x`` the field of which it is one Euler step of length
1, whatever its norms: ``F(x) = MHA(N(x))`` pre-norm, ``F(x) = N(x + MHA(x)) - x`` post-norm. So the layer, S_1 and then
S_2, is the Lie-Trotter step with Euler substeps for ``dx/dt = A(x) + B(x)``, A = F_1, B = F_2, in which everything
frozen (weights, masks, what cross-attention reads) stays as it is. A decoder layer has three such fields. Everything is
computed in float64, on inputs that the model's own layers before have made.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from macaron_ops.nn import LieTrotterDecoderLayer, LieTrotterEncoderLayer
from macaron_ops.ops import Substep, split_layer, use_backend
from macaron_ops.ops.checks import number
from macaron_ops.splitting import RUNGE_KUTTA, bracket

from .calls import arguments, batch_first, real_tokens, slow_path
from .replace import replace_layers

__all__ = ["MEASURES", "LayerError", "splitting_error"]

Map = Callable[[Tensor], Tensor]

MEASURES = {
    "lie_trotter": "the layer itself: every sublayer one Euler step, one after another",
    "strang": "the last sublayer half before and half after (Macaron's order), Euler substeps",
    "unsplit": "x + A(x) + B(x): one unsplit Euler step, the parallel layer",
    "apart": "the layer's distance from the Strang step, not from the flow",
    "lie_trotter_exact": "Lie-Trotter with exact substeps: the splitting alone",
    "strang_exact": "Strang with exact substeps: the splitting alone",
    "commutator": "|[A, B](x)| / 2, what the theory says of lie_trotter_exact for small fields",
}

_COARSEST, _FINEST = 4, 256  # steps
_WHOLE = ("torch", "bert")  # the families whose layers are nothing but their substeps, and say which
_BUILT_SO = (LieTrotterEncoderLayer, LieTrotterDecoderLayer)


@dataclass(frozen=True)
class LayerError:
    """Distances at one layer, a number for each token.

    Attributes:
        name: of the layer in the model. cls: its class.
        moved: ``|flow(x) - x|``, how far the exact flow takes a token in the time 1.
        size: ``|x|``.
        errors: the distances of :data:`MEASURES` from ``flow(x)``, each divided by ``moved``.
        resolved: how much the flow itself still changed, in units of ``moved``, when its steps were halved last.
        steps: of the RK4 that resolved the flow.
    """

    name: str
    cls: str
    moved: Tensor
    size: Tensor
    errors: dict[str, Tensor]
    resolved: float
    steps: int

    def median(self, measure: str) -> float:
        return self.errors[measure].median().item()


def splitting_error(
    model: nn.Module,
    inputs: Tensor | Sequence[object] | Mapping[str, object],
    *,
    tokens: Tensor | None = None,
    tolerance: float = 1e-3,
) -> list[LayerError]:
    """For each layer of torch's and of the BERT family, in the order of the calls: its distance from the flow of its
    own frozen fields, that of a Strang step and of other schemes, and the size of the commutator, per token.

    Nothing is said of quality: a trained layer need not approximate any flow. Only how far it is from one.

    Example::

        for layer in splitting_error(model, tokenizer(sentences, padding=True, return_tensors="pt")):
            print(layer.name, layer.median("lie_trotter"), layer.median("strang"))

    Args:
        model: left as it is; a copy in float64 is looked at. It may itself be a layer.
        inputs: of its ``forward``, a tensor, positional arguments or keyword arguments.
        tokens: ``(B, T)``, True where a token counts; None: the ``attention_mask`` of the inputs if they have one of
            two dimensions, else every token.
        tolerance: how well the flow is resolved, in units of what it moves: its RK4 steps are halved until they
            change it by no more.

    Raises:
        ValueError: no layer is known, or a flow is not resolved with 256 steps.
        TypeError: an argument is of the wrong kind.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    tolerance = number("tolerance", tolerance, minimum=1e-12)
    args, kwargs = arguments(inputs, torch.float64)
    tokens = real_tokens(kwargs) if tokens is None else tokens
    model = copy.deepcopy(model).double().eval()
    report = replace_layers(model, families=_WHOLE)
    with torch.no_grad(), use_backend("reference"):
        calls = _record(model, args, kwargs)
        if not calls:
            raise ValueError(f"model: expected one with layers of torch or of the BERT family; {report}")
        return [_layer_error(name, layer, x, substeps, tokens, tolerance) for name, layer, x, substeps in calls]


def _layer_error(
    name: str, layer: nn.Module, x: Tensor, substeps: Sequence[Substep], tokens: Tensor | None, tolerance: float
) -> LayerError:
    fields = [partial(_field, s) for s in substeps]

    def total(x: Tensor) -> Tensor:
        return sum(field(x) for field in fields)

    def counted(value: Tensor) -> Tensor:
        return value.flatten() if tokens is None else value[tokens.to(value.device)]

    flow, resolved, n = _resolve(total, x, tolerance, counted)
    euler = [partial(_euler, field) for field in fields]
    exact = [partial(_rk4, field, n) for field in fields]
    found = {
        "lie_trotter": _lie_trotter(euler, x),
        "strang": _strang(euler, x),
        "unsplit": x + total(x),
        "lie_trotter_exact": _lie_trotter(exact, x),
        "strang_exact": _strang(exact, x),
    }
    moved = (flow - x).norm(dim=-1)
    distances = {measure: (y - flow).norm(dim=-1) for measure, y in found.items()}
    distances["apart"] = (found["lie_trotter"] - found["strang"]).norm(dim=-1)
    pairs = [(f, g) for i, f in enumerate(fields) for g in fields[i + 1 :]]
    distances["commutator"] = sum(bracket(f, g)(x) for f, g in pairs).norm(dim=-1) / 2
    errors = {measure: counted(distances[measure] / moved) for measure in MEASURES}
    cls = getattr(layer, "replaced_class", type(layer)).__name__
    return LayerError(name, cls, counted(moved), counted(x.norm(dim=-1)), errors, resolved, n)


def _field(substep: Substep, x: Tensor) -> Tensor:
    return split_layer(x, [substep]) - x


def _euler(field: Map, x: Tensor, s: float) -> Tensor:
    return x + s * field(x)


def _rk4(field: Map, steps: int, x: Tensor, s: float) -> Tensor:
    """x after the time s under one field; ``steps`` in the time 1."""
    steps = math.ceil(steps * s)
    for _ in range(steps):
        x = RUNGE_KUTTA["rk4"](lambda t, x: field(x), 0.0, x, s / steps)
    return x


def _lie_trotter(advances: Sequence[Callable[[Tensor, float], Tensor]], x: Tensor) -> Tensor:
    for advance in advances:
        x = advance(x, 1.0)
    return x


def _strang(advances: Sequence[Callable[[Tensor, float], Tensor]], x: Tensor) -> Tensor:
    """Half steps from the last to the second, the first whole, half steps back."""
    first, *others = advances
    for advance in reversed(others):
        x = advance(x, 0.5)
    x = first(x, 1.0)
    for advance in others:
        x = advance(x, 0.5)
    return x


def _resolve(field: Map, x: Tensor, tolerance: float, counted: Map) -> tuple[Tensor, float, int]:
    """The flow over the time 1, its last change in units of what it moves, and its steps."""
    steps, coarse, change = _COARSEST, _rk4(field, _COARSEST, x, 1.0), math.inf
    while steps < _FINEST:
        steps *= 2
        fine = _rk4(field, steps, x, 1.0)
        change = counted((fine - coarse).norm(dim=-1) / (fine - x).norm(dim=-1)).max().item()
        if change <= tolerance:
            return fine, change, steps
        coarse = fine
    raise ValueError(f"tolerance: expected one that {_FINEST} steps of RK4 reach; the last change was {change:.1e}")


Call = tuple[str, nn.Module, Tensor, list[Substep]]


def _record(model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> list[Call]:
    """Every call of a known layer in a run of the model: what came in, batch first, and its substeps."""
    calls: list[Call] = []
    inputs: dict[nn.Module, Tensor] = {}

    def watch(name: str, layer: nn.Module) -> None:
        substeps = layer.substeps

        def remember(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs[layer] = batch_first(layer, args[0] if args else next(iter(kwargs.values())))

        def record(*args: object, **kwargs: object) -> list[Substep]:
            found = substeps(*args, **kwargs)
            calls.append((name, layer, inputs[layer], found))
            return found

        layer.substeps = record
        layer.register_forward_pre_hook(remember, with_kwargs=True)

    for name, layer in list(model.named_modules()):
        if hasattr(layer, "replaced_class") or type(layer) in _BUILT_SO:
            watch(name, layer)
    with slow_path():
        model(*args, **kwargs)
    return calls
