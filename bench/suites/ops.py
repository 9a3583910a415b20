"""Each operator of macaron_ops against its eager form, torch.compile of that, and its bare matrix products.

ffn_step is the half-step (step 1/2, width F/2) and attend_step the whole step of a preset's Strang layer;
normalize_step and sphere_attend_step move particles on the unit sphere. On a GPU there are also a whole FFN of width
4096 and row kernels, normalize_step and the norms around products, Triton's and the CUDA library's, at 1, 64 and 256 MB
a tensor: those are limited by memory, and told as a share of the copy bandwidth.

On a GPU what ffn_step and the row kernels read is taken from memory: each call has another copy of the tensors.

Particles in three dimensions are float32 unless another dtype is asked for, and have more denominators: eager with its
n x n matrix, `scaled_dot_product_attention`, and pykeops where it is installed. Eight times as many, too many for the
matrix, are measured alone; on a GPU these are 262,144, beside pykeops, in a full run also a million, and 65,536 of 64
channels beside `scaled_dot_product_attention`.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import eager, flops, norm_kernels, products
from ..correctness import Yardstick
from ..group import (
    COMPILED,
    EAGER,
    KEOPS,
    OURS,
    PRODUCTS,
    REFERENCE,
    SDPA,
    Group,
    Ready,
    Variant,
    backend_names,
    copies,
    gradients,
    in_turn,
    on_backend,
)
from ..options import DTYPES, Options
from ..presets import PRESETS, Preset

# ffn_step, the most of a layer's arithmetic, is measured at every preset; a quick run looks at one.
QUICK_PRESETS = ("wmt-base",)
NORMAL_PRESETS = ("wmt-base", "bert-base", "conformer-m")

_PARTICLES = {"cpu": {"quick": (4, 512, 64), "normal": (4, 1024, 64), "full": (8, 2048, 64)}}
_PARTICLES["cuda"] = {"quick": (16, 1024, 64), "normal": (16, 4096, 64), "full": (16, 8192, 128)}
_IN_SPACE = {"cpu": {"quick": 4096, "normal": 16384, "full": 16384}}
_IN_SPACE["cuda"] = {"quick": 8192, "normal": 16384, "full": 32768}
_MANY = 8  # times as many as in space
_MANY_ON_GPU = 1 << 18
_MILLION = 1 << 20
_CHECKED = 256  # of the many
_KEOPS_DTYPES = ("float32", "float64")  # that it has on every device
_STEP, _BETA = 0.1, 4.0
WIDE_PRESET = "wmt-big"  # whose whole FFN is measured too
_MEGABYTES = {"quick": (1, 64), "normal": (1, 64, 256), "full": (1, 64, 256, 1024)}
_ROW = 1024  # channels of the row kernels' rows


@dataclass(frozen=True)
class Case:
    """An operator at one shape: its tensors, its two forms, its products and useful operations.

    `rivals` are further forms that are not ours, `exact` the eager form that computes the truth, where another one
    would take too much memory. `alone`: too large for eager forms and the reference; the first particles are checked.
    `cold`: on a GPU its tensors are read from memory. `row_passes`: how many tensors like x a forward, and a forward
    with its backward, read and write at the least, where memory is the limit. `kernel`: `fused` is of no operator, and
    takes the name of the backend whose kernel it is, one of `norm_kernels.BACKENDS`.
    """

    subject: str
    shape: dict[str, object]
    tensors: dict[str, tuple[int, ...]]
    eager: Callable[..., Tensor]
    fused: Callable[..., Tensor]
    products: list[products.Shape]
    flops: int | None
    on_sphere: bool = False
    rivals: dict[str, Callable[..., Tensor]] = field(default_factory=dict)
    exact: Callable[..., Tensor] | None = None
    alone: bool = False
    min_rounds: int | None = None
    dtypes: tuple[str, ...] = tuple(DTYPES)
    cold: bool = False
    row_passes: tuple[int, int] | None = None
    kernel: bool = False


def groups(options: Options) -> list[Group]:
    found = [
        group(case, dtype, direction, options)
        for case in cases(options)
        for dtype in options.dtypes
        if dtype in case.dtypes or (options.dtype_names and case.row_passes is None)
        for direction in (flops.PASSES if not case.alone else ("forward",))
    ]
    return [group for group in found if group.names]


def cases(options: Options) -> list[Case]:
    device, effort = options.device.type, options.effort
    names = {"quick": QUICK_PRESETS, "normal": NORMAL_PRESETS, "full": tuple(PRESETS)}[effort]
    some = [PRESETS[name] for name in names]
    every = some if effort == "quick" else PRESETS.values()
    found = [
        *(ffn_case(preset, *preset.size(device, effort)) for preset in every),
        *(attend_case(preset, *preset.size(device, effort)) for preset in some),
        *(normalize_case(preset, *preset.size(device, effort)) for preset in some),
        sphere_case(*_PARTICLES[device][effort]),
        space_case(_IN_SPACE[device][effort]),
    ]
    if effort != "quick":
        many = {"cpu": many_case(_MANY * _IN_SPACE["cpu"][effort]), "cuda": many_case(_MANY_ON_GPU, _by_keops())}
        found.append(many[device])
    if device == "cuda":
        found += [many_case(_MILLION)] if effort == "full" else []
        wide = PRESETS[WIDE_PRESET]
        found += [whole_ffn_case(wide, *wide.size(device, effort)), wide_many_case(65536, 64), *row_cases(options)]
    return found


def row_cases(options: Options) -> list[Case]:
    """The row kernels at some megabytes a tensor, whatever its dtype; what differs little from layer_norm at two."""
    sizes, two = _MEGABYTES[options.effort], _MEGABYTES["quick"]
    kernels = [
        (normalize_rows_case, sizes),
        (partial(norm_case, "layer"), sizes),
        *((partial(norm_case, name), two) for name in ("residual", "rms", "sphere")),
    ]
    return [
        replace(case((megabytes << 20) // (_ROW * DTYPES[dtype].itemsize), megabytes), dtypes=(dtype,))
        for case, chosen in kernels
        for megabytes in chosen
        for dtype in options.dtypes
    ]


def ffn_case(preset: Preset, batch: int, length: int) -> Case:
    import macaron_ops

    width, hidden = preset.width, preset.hidden // 2

    def fused(x, w_in, b_in, w_out, b_out, norm_weight, norm_bias):
        norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
        return macaron_ops.ffn_step(x, w_in, b_in, w_out, b_out, activation=preset.activation, step=0.5, **norm)

    return Case(
        f"ffn_step {preset.name}",
        {"batch": batch, "length": length, "width": width, "hidden": hidden, "activation": preset.activation},
        {"x": (batch, length, width), "w_in": (hidden, width), "b_in": (hidden,), "w_out": (width, hidden)}
        | {"b_out": (width,), "norm_weight": (width,), "norm_bias": (width,)},
        partial(eager.ffn_step, activation=preset.activation, step=0.5),
        fused,
        [products.linear_shape(batch * length, width, hidden), products.linear_shape(batch * length, hidden, width)],
        flops.ffn_flops(batch * length, width, hidden),
        cold=True,
    )


def whole_ffn_case(preset: Preset, batch: int, length: int) -> Case:
    """The FFN of the Lie-Trotter layer, of the preset's whole width."""
    case = ffn_case(replace(preset, hidden=2 * preset.hidden), batch, length)
    return replace(case, subject=f"{case.subject} F={preset.hidden}")


def attend_case(preset: Preset, batch: int, length: int) -> Case:
    import macaron_ops

    width, heads = preset.width, preset.heads

    def fused(x, w_qkv, b_qkv, w_out, b_out, norm_weight, norm_bias):
        norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
        return macaron_ops.attend_step(x, w_qkv, b_qkv, w_out, b_out, heads, **norm)

    return Case(
        f"attend_step {preset.name}",
        {"batch": batch, "length": length, "width": width, "heads": heads},
        {"x": (batch, length, width), "w_qkv": (3 * width, width), "b_qkv": (3 * width,), "w_out": (width, width)}
        | {"b_out": (width,), "norm_weight": (width,), "norm_bias": (width,)},
        partial(eager.attend_step, heads=heads),
        fused,
        [
            products.linear_shape(batch * length, width, 3 * width),
            products.linear_shape(batch * length, width, width),
            *products.attention_shapes(batch, heads, length, width // heads),
        ],
        flops.attention_flops(batch, length, width),
    )


def normalize_case(preset: Preset, batch: int, length: int) -> Case:
    import macaron_ops

    shape = (batch, length, preset.width)
    return Case(
        f"normalize_step {preset.name}",
        {"batch": batch, "length": length, "width": preset.width},
        {"x": shape, "u": shape},
        partial(eager.normalize_step, step=_STEP),
        lambda x, u: macaron_ops.normalize_step(x, u, _STEP),
        [],
        None,
        on_sphere=True,
        cold=True,
        row_passes=(3, 8),  # x and u to y; then grad, x and u to their gradients
    )


def normalize_rows_case(rows: int, megabytes: int) -> Case:
    return replace(
        normalize_case(replace(PRESETS[WIDE_PRESET], width=_ROW), 1, rows),
        subject=f"normalize_step {megabytes} MB",
    )


def norm_case(name: str, rows: int, megabytes: int) -> Case:
    """The norm that stands around a wide FFN, as rows of its own: "layer", "rms", "sphere", or "residual", layer's of
    the sum x + z, which is kept."""
    summed = name == "residual"
    norm = "layer" if summed else name
    biases = {"norm_bias": (_ROW,)} if norm == "layer" else {}
    return Case(
        f"{name}_norm {megabytes} MB",
        {"batch": 1, "length": rows, "width": _ROW},
        {"x": (1, rows, _ROW), "norm_weight": (_ROW,)} | biases | ({"z": (1, rows, _ROW)} if summed else {}),
        partial(norm_kernels.eager, norm),
        partial(norm_kernels.fused, norm),
        [],
        None,
        cold=True,
        # x to n, or x and z to n and the sum; then grad and what was normalised to its gradient
        row_passes=(4, 7) if summed else (2, 5),
        kernel=True,
    )


def sphere_case(batch: int, particles: int, dimension: int) -> Case:
    import macaron_ops

    by_sdpa = partial(eager.sphere_attend_step_sdpa, step=_STEP, beta=_BETA)
    return Case(
        f"sphere_attend_step D={dimension}",
        {"batch": batch, "particles": particles, "dimension": dimension, "beta": _BETA},
        {"x": (batch, particles, dimension)},
        partial(eager.sphere_attend_step, step=_STEP, beta=_BETA),
        lambda x: macaron_ops.sphere_attend_step(x, _STEP, _BETA),
        products.attention_shapes(batch, 1, particles, dimension),
        4 * batch * particles * particles * dimension,
        on_sphere=True,
        rivals={SDPA: by_sdpa},
        exact=by_sdpa,
    )


def space_case(particles: int) -> Case:
    """Particles in space. No products: at D=3 those are hardly any of the work."""
    case = sphere_case(1, particles, 3)
    return replace(case, products=[], rivals=case.rivals | _by_keops(), min_rounds=5, dtypes=("float32",))


def _by_keops() -> dict[str, Callable[..., Tensor]]:
    """Where it is installed."""
    by_keops = partial(eager.sphere_attend_step_keops, step=_STEP, beta=_BETA)
    return {KEOPS: by_keops} if importlib.util.find_spec("pykeops") else {}


def many_case(particles: int, rivals: dict[str, Callable[..., Tensor]] | None = None) -> Case:
    """As many as only a form in linear memory can do."""
    case = sphere_case(1, particles, 3)
    subject = f"{case.subject}, {particles:,} particles"
    return replace(
        case, subject=subject, products=[], rivals=rivals or {}, alone=True, min_rounds=3, dtypes=("float32",)
    )


def wide_many_case(particles: int, dimension: int) -> Case:
    """As many on tensor cores, beside the attention that PyTorch has."""
    case = sphere_case(1, particles, dimension)
    subject = f"{case.subject}, {particles:,} particles"
    return replace(case, subject=subject, products=[], alone=True, min_rounds=3, dtypes=("bfloat16", "float16"))


def group(case: Case, dtype: str, direction: str, options: Options) -> Group:
    x = case.tensors["x"]
    compiled = (COMPILED,) if options.compile and options.effort != "quick" else ()
    rivals = (name for name in case.rivals if name != KEOPS or dtype in _KEOPS_DTYPES)
    theirs = (*(() if case.alone else (EAGER, *compiled)), *rivals)
    ours = (f"{OURS} {name}" for name in _backends(case, options))
    bare = (PRODUCTS,) if case.products else ()
    return Group(
        suite="ops",
        subject=case.subject,
        shape=case.shape,
        dtype=dtype,
        direction=direction,
        tokens=x[0] * x[1],
        flops=case.flops and flops.of_pass(case.flops, direction),
        denominator=EAGER,
        names=(*theirs, *ours, *bare),
        build=partial(_build, case, DTYPES[dtype], direction, options),
        min_rounds=case.min_rounds,
        bytes=_bytes(case, dtype, direction),
    )


def _backends(case: Case, options: Options) -> tuple[str, ...]:
    """The reference, where its calls take seconds, only if asked for or, but for the many, if nothing else can run."""
    names = backend_names(options)
    if case.kernel:
        return tuple(name for name in names if name in norm_kernels.BACKENDS)
    if options.backends or not case.min_rounds:
        return names
    fused = tuple(name for name in names if name != REFERENCE)
    return fused if case.alone else fused or names


def _bytes(case: Case, dtype: str, direction: str) -> int | None:
    if case.row_passes is None:
        return None
    passes = dict(zip(flops.PASSES, case.row_passes, strict=True))[direction]
    return passes * math.prod(case.tensors["x"]) * DTYPES[dtype].itemsize


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Tensor]:
    """Random tensors rounded to `dtype`; x of an operator on the sphere has rows of length one."""
    generator = torch.Generator(device=device).manual_seed(seed)
    inputs = {}
    for name, shape in case.tensors.items():
        if name in "xuz":
            values = torch.randn(shape, generator=generator, device=device)
        else:
            values = eager.random_parameter(name, shape, generator)
        inputs[name] = (F.normalize(values, dim=-1) if case.on_sphere and name == "x" else values).to(dtype)
    if case.shape.get("activation") == "relu":
        names = ("x", "w_in", "b_in", "norm_weight", "norm_bias")
        inputs["b_in"] += eager.kink_shift(*(inputs[name].double() for name in names)).to(dtype)
    return inputs


def _build(case: Case, dtype: torch.dtype, direction: str, options: Options, names: Sequence[str]) -> Iterable[Variant]:
    inputs = make_inputs(case, dtype, options.device, options.seed)
    backward = direction != "forward"
    for tensor in inputs.values():
        tensor.requires_grad_(backward)
    generator = torch.Generator(device=options.device).manual_seed(options.seed + 1)
    grad = torch.randn(case.tensors["x"], generator=generator, device=options.device).to(dtype)
    nbytes = sum(tensor.nbytes for tensor in inputs.values())
    sets = [(inputs, grad)] + [
        _copy(inputs, grad) for _ in range(copies(nbytes, options.device) - 1 if case.cold else 0)
    ]

    def ready(operator: Callable[..., Tensor], tensors: dict[str, Tensor], grad: Tensor) -> Ready:
        return gradients(lambda: operator(**tensors), tuple(tensors.values()), grad, direction)

    def in_sets(operator: Callable[..., Tensor]) -> Ready:
        return in_turn([ready(operator, *one) for one in sets])

    @cache
    def yardstick() -> Yardstick:
        exact = {name: tensor.detach().double().requires_grad_(backward) for name, tensor in inputs.items()}
        if case.alone:
            truths, found = (case.exact(x[:, :_CHECKED], others=x) for x in (exact["x"], inputs["x"]))
            return Yardstick.of(["output"], [truths], [found])
        truths = ready(case.exact or case.eager, exact, grad.double()).call()
        tensors = ["output", *(f"{name} gradient" for name in inputs)][: len(truths)]
        return Yardstick.of(tensors, truths, ready(case.eager, inputs, grad).call())

    def check(foreign: bool, found: Sequence[Tensor]) -> dict[str, object]:
        seen = [found[0][:, :_CHECKED]] if case.alone else found
        return yardstick().check(seen, foreign=foreign)

    def prepare(name: str) -> Ready:
        if name == EAGER:
            return in_sets(case.eager)
        if name == COMPILED:
            return in_sets(torch.compile(case.eager, fullgraph=True, dynamic=False))
        if name in case.rivals:
            return in_sets(case.rivals[name])
        backend = name.removeprefix(OURS).strip()
        return in_sets(partial(case.fused, backend) if case.kernel else on_backend(backend, case.fused))

    for name in names:
        if name == PRODUCTS:
            yield products.variant(case.products, direction, dtype, options.device, len(sets))
        else:
            seen = partial(check, name == COMPILED or name in case.rivals)
            yield Variant(name, partial(prepare, name), seen, capturable=name != KEOPS)


def _copy(tensors: dict[str, Tensor], grad: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The same numbers in other memory."""
    return {
        name: tensor.detach().clone().requires_grad_(tensor.requires_grad) for name, tensor in tensors.items()
    }, grad.clone()
