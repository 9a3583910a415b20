"""The kernel launches that the operators make on a GPU, recorded on meta tensors: nothing is computed, no GPU needed.

An operator is a row of ``OPERATORS``: a function from an architecture and what is wanted to (launch, dtype) pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from macaron_ops.kernels import attend_step, ffn_step, normalize_step, sphere_attend_step
from macaron_ops.kernels.attention_core import use_core, why_not_core
from macaron_ops.kernels.border import ALONE_AHEAD, ALONE_BEHIND, Ahead, Behind, begins, ends
from macaron_ops.kernels.device import Launch, recording
from macaron_ops.kernels.tiles import operand, tables, using
from macaron_ops.reference.attend_step import Options as AttendOptions
from macaron_ops.reference.attend_step import Tensors as AttendTensors
from macaron_ops.reference.ffn_step import Options, Tensors
from macaron_ops.reference.normalize_step import Options as StepOptions
from macaron_ops.reference.normalize_step import Tensors as StepTensors
from macaron_ops.reference.sphere_attend_step import Options as SphereOptions
from macaron_ops.reference.sphere_attend_step import Tensors as SphereTensors

__all__ = [
    "DTYPES",
    "NEEDS",
    "OPERATORS",
    "PROCESSORS",
    "Wanted",
    "attend_arguments",
    "ffn_arguments",
    "launches_of_attend",
    "launches_of_ffn",
    "multiplying",
]

PROCESSORS = {"sm80": 108, "sm90": 132, "sm100": 148, "gfx942": 304}  # A100, H100, B200, MI300X
# tf32 is float32 with torch's setting for products.
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "tf32": torch.float32,
}
NEEDS = (True,) * 7 + (False,)  # gradients of ffn_step: x and every tensor but the seed
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu")
GATED = ("swiglu", "geglu")


class Form(NamedTuple):
    """What stands around the two products; the rms norm has no bias."""

    norm: str | None = "layer"
    affine: bool = True
    placement: str = "pre"


PLAIN, POST = Form(), Form(placement="post")
FORMS = (
    Form(None),
    *itertools.starmap(Form, itertools.product(("layer", "rms", "sphere"), (True, False), ("pre", "post"))),
)
# The kernels that know an activation know no norm, but the narrow one, which is through with one before the other.
USES = (*((activation, PLAIN) for activation in ACTIVATIONS), *(("gelu", form) for form in FORMS), ("swiglu", POST))
TALL, SMALL, NARROW = (16384, 1024, 4096), (1024, 512, 1024), (16384, 128, 512)
FEW = (8, 2048, 2048)  # every product in parts
ROWS = ((1024, 8192, 1024), (64, 16384, 64))  # the widest in registers, and one in blocks
SHAPES = (TALL, (16384, 256, 1024), SMALL, NARROW, (1024, 64, 128), *ROWS, FEW)  # (tokens, D, F)
_SHAPES_OF = {  # calls that launch a product, where TALL's do not
    "narrow": (NARROW, (1024, 64, 128)),
    "narrow_dropout": (NARROW, (1024, 64, 128)),
    "linear_norm": ((16384, 256, 1024),),
    "linear_norm_dropout": ((16384, 256, 1024),),
    "few": (FEW,),
}


@dataclass(frozen=True)
class Wanted:
    """Which calls are made: of these shapes (tokens, D, F) and dtypes, else a few that show every kernel; ``every``: by
    each tile of the tables in all of ``USES``, with and without dropout."""

    shapes: tuple[tuple[int, int, int], ...] = ()
    dtypes: tuple[str, ...] = ()
    every: bool = False


@contextmanager
def multiplying(dtype: str) -> Iterator[torch.dtype]:
    """The torch dtype of a name of ``DTYPES``, torch's setting for float32 products being what the name says."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield DTYPES[dtype]
    finally:
        torch.set_float32_matmul_precision(before)


def ffn_arguments(
    tokens, width, hidden, dtype, activation="gelu", *, weights=None, dropout=0.0, affine=(True, True), **options
):
    """``(x, tensors, options)``; ``weights`` is the dtype of the products' operands, if it is another, ``affine``
    whether a norm has its weight and its bias."""
    weights = weights or dtype

    def empty(*shape, dtype=weights):
        return torch.empty(shape, dtype=dtype, device="meta")

    inner = 2 * hidden if activation in GATED else hidden
    options = {"norm": "layer", "eps": 1e-5, "step": 0.5, "residual_scale": 1.0, "placement": "pre", **options}
    by_channel = (empty(width, dtype=dtype) if has and options["norm"] is not None else None for has in affine)
    tensors = Tensors(
        empty(inner, width), empty(inner), empty(width, hidden), empty(width), *by_channel, empty(dtype=torch.int64)
    )
    options = Options(activation=activation, dropout=dropout, activation_dropout=dropout, stream=0, **options)
    return empty(tokens, width, dtype=dtype), tensors, options


def launches_of_ffn(
    x,
    tensors,
    options,
    architecture="sm90",
    processors=132,
    save="fast",
    needs=None,
    ahead=ALONE_AHEAD,
    behind=ALONE_BEHIND,
):
    """``(forward's, backward's)`` launches; ``needs`` None: of all but the seed."""
    if needs is None:
        needs = [True, *(t is not None for t in tensors[:-1]), False]
    with recording(architecture, processors) as forward:
        _, saved, _ = ffn_step.forward(x, tensors, options, save, ahead)
    with recording(architecture, processors) as backward:
        ffn_step.backward(torch.empty_like(x), needs, x, tensors, saved, options, behind)
    return forward, backward


def attend_arguments(
    tokens,
    width,
    heads,
    dtype=torch.bfloat16,
    *,
    packed=True,
    rotary=False,
    mask=(1, 1),
    hidden=False,
    dropout=0.0,
    **options,
):
    """``(x, tensors, options)`` of four sequences; ``mask`` are the first dimensions of a floating mask, None: none;
    ``hidden``: with the other ways to hide keys."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    weights = (empty(3 * width, width), None, None) if packed else [empty(width, width) for _ in range(3)]
    biases = (empty(3 * width), None, None) if packed else [empty(width) for _ in range(3)]
    angles = [empty(tokens, width // heads // 2) for _ in range(2)] if rotary else (None, None)
    options = {"norm": "layer", "eps": 1e-5, "placement": "pre", "causal": True, **options}
    affine = (None, None) if options["norm"] is None else (empty(width), empty(width))
    bias = None if mask is None else empty(*mask, tokens, tokens)
    padding, borders = (empty(4, tokens, dtype=torch.bool), empty(9, dtype=torch.int32)) if hidden else (None, None)
    constants = (None, bias, padding, borders, *angles, None, empty(dtype=torch.int64))
    tensors = AttendTensors(*weights, *biases, empty(width, width), empty(width), *affine, *constants)
    given = {"num_heads": heads, "num_kv_heads": heads, "step": 1.0, "residual_scale": 1.0, "scale": 0.1, "stream": 0}
    options = AttendOptions(**given, dropout=dropout, attention_dropout=dropout, **options)
    return empty(4, tokens, width), tensors, options


def launches_of_attend(x, tensors, options, architecture="sm90", processors=132, save="fast", needs=None):
    """``(forward's, backward's)`` launches; ``needs`` None: of all but the constants."""
    if needs is None:
        constants = ("cu_seqlens", "cos", "sin", "seed")
        pairs = zip(tensors._fields, tensors, strict=True)
        needs = [True, *(t is not None and t.dtype != torch.bool and name not in constants for name, t in pairs)]
    with recording(architecture, processors) as forward:
        _, saved, _ = attend_step.forward(x, tensors, options, save)
    with recording(architecture, processors) as backward:
        attend_step.backward(torch.empty_like(x), needs, x, tensors, saved, options)
    return forward, backward


def _ffn_step(architecture: str, wanted: Wanted) -> Iterator[tuple[Launch, str]]:
    def launches(shape, dtype, p, use):
        activation, form = use
        affine = form.affine, form.affine and form.norm != "rms"
        with multiplying(dtype) as torch_dtype:
            around = {"norm": form.norm, "placement": form.placement, "affine": affine}
            arguments = ffn_arguments(*shape, torch_dtype, activation, dropout=p, **around)
            for found in launches_of_ffn(*arguments, architecture, PROCESSORS[architecture]):
                yield from ((launch, dtype) for launch in found if form == PLAIN or matters(launch, shape, dtype))

    def matters(launch, shape, dtype):
        """Whether to look at a kernel again for its norm: rows of 64 to 2048 channels have one tile, and float16's
        kernels are bfloat16's but for the conversions."""
        of_rows = launch.kernel.__name__.startswith("norm_")
        return (wanted.shapes or not of_rows or shape in (TALL, *ROWS)) and (wanted.dtypes or dtype != "float16")

    if wanted.every:
        grid = itertools.product(wanted.shapes or SHAPES, wanted.dtypes or DTYPES, (0.0, 0.1), USES)
        for call in grid:
            yield from launches(*call)
        yield from _of_every_tile(architecture, wanted.dtypes or tuple(DTYPES), launches)
        return
    gelu, swiglu = ("gelu", PLAIN), ("swiglu", POST)
    few = [(TALL, "bfloat16", 0.0, gelu), (NARROW, "bfloat16", 0.0, swiglu), (FEW, "bfloat16", 0.0, gelu)]
    if wanted.shapes or wanted.dtypes:
        dtypes = wanted.dtypes or ("bfloat16",)
        few = itertools.product(wanted.shapes or (TALL, NARROW), dtypes, (0.0, 0.1), (gelu, swiglu))
    elif architecture == "sm90":
        few += [(shape, "bfloat16", 0.0, gelu) for shape in SHAPES]
        few += [(TALL, "bfloat16", 0.0, swiglu), ((16384, 256, 1024), "bfloat16", 0.1, swiglu)]
        few += [(SMALL, "bfloat16", 0.1, gelu), (SMALL, "float32", 0.0, gelu)]
    for call in few:
        yield from launches(*call)


def _split_layer(architecture: str, wanted: Wanted) -> Iterator[tuple[Launch, str]]:
    """The kernels in which an FFN step hands something to its neighbours, which are like itself."""
    calls = [((16384, 256, 1024), "bfloat16"), (NARROW, "bfloat16"), (TALL, "bfloat16"), (FEW, "bfloat16")]
    if wanted.shapes or wanted.dtypes:
        calls = itertools.product(wanted.shapes or (TALL, (16384, 256, 1024)), wanted.dtypes or ("bfloat16",))
    elif wanted.every:
        calls = itertools.product(
            (TALL, (16384, 256, 1024), NARROW, (1024, 64, 128), (8, 256, 16384), (64, 16384, 64)), DTYPES
        )
    for (shape, dtype), p in itertools.product(calls, (0.0, 0.1)):
        with multiplying(dtype) as torch_dtype:
            x, t, o = ffn_arguments(*shape, torch_dtype, dropout=p)
            ahead = Ahead(None, *begins(x, t, o, t.w_in))
            behind = Behind(None, *ends(x, NEEDS, t, o))
            processors = PROCESSORS[architecture]
            for found in launches_of_ffn(x, t, o, architecture, processors, ahead=ahead, behind=behind):
                for launch in found:
                    if launch.constants.get("OF_TOTAL") or launch.kernel.__name__.startswith("norm_backward"):
                        yield launch, dtype


def _of_every_tile(architecture: str, dtypes: tuple[str, ...], launches: Callable) -> Iterator[tuple[Launch, str]]:
    """Each tile that stands in the architecture's tables, whichever shape may take it."""
    for table in (table for table in tables() if table.architecture == architecture):
        rows = [(key, tile) for key, tiles in table.rows.items() for tile in tiles]
        rows += [(key, tile) for key, entries in table.entries.items() for _, tile in entries]
        for (kind, product), tile in dict.fromkeys(rows):
            for dtype in dtypes:
                with multiplying(dtype) as torch_dtype:
                    of_this_kind = operand(torch_dtype) == kind
                shapes = _SHAPES_OF.get(product, (TALL,))
                for call in itertools.product(shapes, (dtype,), (0.0, 0.1), USES) if of_this_kind else ():
                    with using(product, tile):
                        yield from list(launches(*call))


def _attend_step(architecture: str, wanted: Wanted) -> Iterator[tuple[Launch, str]]:
    """Sequences of 1024 tokens, or 64, for which the smallest tiles are: D is the second number of a shape, in heads of
    64 where it has them."""
    calls = [(64, "bfloat16", {"mask": None, "dropout": p}) for p in (0.0, 0.1)]
    if wanted.shapes or wanted.dtypes:
        dims = {64 if shape[1] % 64 == 0 else 16 for shape in wanted.shapes} or {64, 128}
        calls = [(dim, dtype, {"mask": None}) for dim in sorted(dims) for dtype in wanted.dtypes or ("bfloat16",)]
    elif wanted.every:
        grid = itertools.product((16, 32, 64, 80, 128, 256), DTYPES, (None, (1, 1)), (0.0, 0.1))
        calls = [(dim, dtype, {"mask": mask, "dropout": p, "rotary": True}) for dim, dtype, mask, p in grid]
    elif architecture == "sm90":
        calls += [(128, "bfloat16", {"mask": None, "rotary": True})]
        calls += [(64, "bfloat16", {"mask": (4, 1), "causal": False, "hidden": True})]
    lengths = (1024, 64) if wanted.every else (1024,)
    for (head_dim, dtype, options), tokens in itertools.product(calls, lengths):
        with multiplying(dtype) as torch_dtype:
            arguments = attend_arguments(tokens, 8 * head_dim, 8, torch_dtype, **options)
            for core in ("triton", "cudnn") if why_not_core("cudnn", *arguments) is None else ("triton",):
                with use_core(core):
                    launches = launches_of_attend(*arguments, architecture, PROCESSORS[architecture])
                yield from [(launch, dtype) for found in launches for launch in found]


def _normalize_step(architecture: str, wanted: Wanted) -> Iterator[tuple[Launch, str]]:
    """Rows in registers and in blocks."""
    calls = [(3, "float32"), (1000, "bfloat16"), (1024, "bfloat16"), (16384, "bfloat16")]
    if wanted.shapes or wanted.dtypes:
        dtypes = [d for d in wanted.dtypes or ("bfloat16",) if d != "tf32"]
        calls = itertools.product({shape[1] for shape in wanted.shapes} or (1024, 16384), dtypes)
    elif wanted.every:
        calls += [(8192, "bfloat16"), (1024, "float32"), (8192, "float32"), (16384, "float32")]
    directions = ("tangent", "difference", "ambient") if wanted.every else ("tangent",)
    for (width, dtype), direction in itertools.product(calls, directions):
        x = torch.empty((4096, width), dtype=DTYPES[dtype], device="meta")
        steps = [torch.empty(width, device="meta")]
        if wanted.every:
            steps += [torch.empty((), device="meta"), None]
        for step in steps:
            tensors, options = StepTensors(x, step), StepOptions(0.5 if step is None else 0.0, direction, 1e-12)
            with recording(architecture, PROCESSORS[architecture]) as found:
                normalize_step.forward(x, tensors, options, "fast")
                needs = (True, True, step is not None)
                normalize_step.backward(x, needs, x, tensors, normalize_step.Saved(), options)
            yield from ((launch, dtype) for launch in found)


def _sphere_attend_step(architecture: str, wanted: Wanted) -> Iterator[tuple[Launch, str]]:
    """Points among themselves: (points, D) are the first two numbers of a shape."""
    calls = [(1 << 18, 3, "float32"), (1 << 16, 64, "bfloat16")]
    if wanted.shapes or wanted.dtypes:
        points = [shape[:2] for shape in wanted.shapes if shape[1] <= 256] or [(1 << 16, 64)]
        calls = [(n, width, dtype) for n, width in points for dtype in wanted.dtypes or ("bfloat16",)]
    elif wanted.every:
        calls = list(itertools.product((1 << 18, 1 << 12), (3, 8, 32, 64, 128, 256), DTYPES))
    elif architecture == "sm90":
        calls += [(1 << 16, 256, "bfloat16"), (1 << 12, 8, "float32"), (1 << 12, 64, "float32")]
    for points, width, dtype in calls:
        with multiplying(dtype) as torch_dtype:
            x = torch.empty((points, width), dtype=torch_dtype, device="meta")
            tensors = SphereTensors(None, None, None, None, None)
            for causal in (False, True) if wanted.every else (False,):
                yield from [(launch, dtype) for launch in _launches_of_sphere(x, tensors, causal, architecture)]
    if architecture != "sm90" or wanted.shapes or wanted.dtypes:
        return
    for width, keys in ((12, 64), (32, 64), (64, 32)):  # values of another width than keys
        x, key, value = (torch.empty((48, w), dtype=torch.bfloat16, device="meta") for w in (width, keys, width))
        tensors = SphereTensors(key, key, value, None, None)
        for causal in (False, True):
            yield from [(launch, "bfloat16") for launch in _launches_of_sphere(x, tensors, causal, architecture)]


def _launches_of_sphere(x, tensors, causal: bool, architecture: str) -> list[Launch]:
    options = SphereOptions(0.3, 4.0, "softmax", "tangent", causal, 1e-12)
    needs = (True, *(t is not None for t in tensors))
    with recording(architecture, PROCESSORS[architecture]) as found:
        _, saved = sphere_attend_step.forward(x, tensors, options, "fast")
        sphere_attend_step.backward(x, needs, x, tensors, saved, options)
    return found


OPERATORS: dict[str, Callable[[str, Wanted], Iterator[tuple[Launch, str]]]] = {
    "ffn_step": _ffn_step,
    "split_layer": _split_layer,
    "attend_step": _attend_step,
    "normalize_step": _normalize_step,
    "sphere_attend_step": _sphere_attend_step,
}
