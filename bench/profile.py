"""`macaron-ops profile`: one layer under torch.profiler, kernel by kernel, and its Chrome trace.

A row is one operator (CPU) or the device kernels that one operator launched (CUDA), with its self time: what it calls
is not in it. How the other columns come about:

    FLOP/s    matrix products and attention only, two operations for each multiply-add, from the recorded shapes;
              of the native kernels, which run a whole pass in one call, the layer's useful operations
    bytes/s   every recorded tensor argument once, plus an output: what must move if nothing stays in a cache.
              A product's output follows from its shapes, any other's is as large as the largest argument.
    of peak   the larger of FLOP/s over the GEMM rate and bytes/s over the copy bandwidth, both measured in this run;
              the letter says which: c compute, m memory
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import ceilings, flops, numbers, suites
from .group import PRODUCTS, Ready
from .options import DTYPES, Options
from .presets import Preset

_WARMUP_CALLS, _CALLS = 3, 10
_WHOLE_PASS = {"macaron_ops_cpu::forward": 1, "macaron_ops_cpu::backward": 2}  # in forwards
_LEAST_SHARE = 0.003  # of the whole time; smaller kernels are summed up in one row

Shape = Sequence[int]


@dataclass
class Kernel:
    """All calls of one operator, per call of the layer."""

    name: str
    seconds: float = 0.0
    count: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    launched: set[str] = field(default_factory=set)


def implementations(preset: Preset, direction: str, options: Options) -> tuple[str, ...]:
    """The variants that can be profiled, by the names `bench layers` gives them."""
    normal = Options(device=options.device, dtype_names=options.dtype_names)
    names = suites.layers.variant_names(preset, direction, normal)
    return tuple(name for name in names if name != PRODUCTS)


def run(preset: Preset, implementation: str, direction: str, options: Options, folder: Path) -> str:
    """Profiles the layer; writes trace.json, kernels.json and kernels.txt into `folder`; returns the table."""
    dtype = options.dtypes[0]
    measured = ceilings.measure_ceilings(options.device, [DTYPES[dtype]], options.seed)
    group = suites.layers.group(preset, dtype, direction, options)
    (variant,) = group.build([implementation])
    ready = variant.prepare()
    if variant.check:
        variant.check(ready.call())
    trace = folder / "trace.json"
    seconds = record(ready, options.device, trace)
    kernels = read(trace, DTYPES[dtype], options.device)
    for kernel in kernels:
        kernel.flops += _WHOLE_PASS.get(kernel.name, 0) * group.flops / flops.of_pass(1, direction)
    text = render(
        kernels, measured, dtype, seconds, f"{preset.name}, {implementation}, {direction}, {dtype}", group.shape
    )
    rate = group.flops / seconds
    share = numbers.share(rate / _gemm(measured, dtype))
    text += f"\n\nwhole layer: {numbers.rate(rate)} TFLOP/s useful, {share} of the GEMM rate"
    text += f"\ntrace: {trace}"
    (folder / "kernels.txt").write_text(text + "\n")
    (folder / "kernels.json").write_text(
        json.dumps([vars(kernel) | {"launched": sorted(kernel.launched)} for kernel in kernels], indent=1)
    )
    return text


def record(ready: Ready, device: torch.device, trace: Path) -> float:
    """Writes the trace of some calls; returns the seconds of one call without the profiler, which slows calls."""
    from .timing import Budget, clock_for, measure

    seconds = measure({"layer": ready.call}, clock_for(device), Budget(seconds=1.0, warmup_calls=_WARMUP_CALLS))[
        "layer"
    ].median
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        for _ in range(_CALLS):
            ready.call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(trace))
    return seconds


def read(trace: Path, dtype: torch.dtype, device: torch.device) -> list[Kernel]:
    """The kernels of a trace that `record` wrote, the slowest first, averaged over its calls."""
    events = json.loads(trace.read_text())["traceEvents"]
    operators = [event for event in events if event.get("cat") == "cpu_op" and event.get("ph") == "X"]
    times = _device_times(events, operators) if device.type == "cuda" else _self_times(operators)
    kernels: dict[str, Kernel] = {}
    for index, (microseconds, launched) in times.items():
        event = operators[index]
        kernel = kernels.setdefault(event["name"], Kernel(event["name"]))
        kernel.seconds += microseconds * 1e-6 / _CALLS
        kernel.count += 1 / _CALLS
        kernel.launched |= launched
        work, moved = cost(event["name"], event.get("args", {}), dtype)
        kernel.flops += work / _CALLS
        kernel.bytes += moved / _CALLS
    return sorted(kernels.values(), key=lambda kernel: -kernel.seconds)


def cost(name: str, arguments: dict[str, object], dtype: torch.dtype) -> tuple[float, float]:
    """(operations, bytes) of one call of an operator, from the shapes and types that the profiler recorded."""
    tensors = []
    for shape, kind in zip(arguments.get("Input Dims", []), arguments.get("Input type", []), strict=False):
        if kind == "TensorList":  # its tensors' types are not recorded
            tensors += [(tuple(part), dtype.itemsize) for part in shape]
        elif kind in _ITEM_BYTES:
            tensors.append((tuple(shape), _ITEM_BYTES[kind]))
    if not tensors:
        return 0.0, 0.0
    inputs = sum(math.prod(shape) * size for shape, size in tensors)
    formula = _FORMULAS.get(name.removeprefix("aten::"))
    shapes = [shape for shape, _ in tensors]
    if name == "aten::cat":
        return 0.0, 2 * inputs
    if name in _ONLY_WRITE:
        return 0.0, inputs
    if formula is None:
        return 0.0, inputs + max(math.prod(shape) * size for shape, size in tensors)
    work, output = formula(shapes)
    return float(work), inputs + output * dtype.itemsize


# In place and without reading what they overwrite: their arguments already are all that moves.
_ONLY_WRITE = ("aten::copy_", "aten::fill_", "aten::zero_")
_ITEM_BYTES = {
    "float": 4,
    "double": 8,
    "c10::BFloat16": 2,
    "c10::Half": 2,
    "long int": 8,
    "int": 4,
    "bool": 1,
    "unsigned char": 1,
}


def _mm(shapes: list[Shape]) -> tuple[int, int]:
    (m, k), (_, n) = shapes[:2]
    return 2 * m * k * n, m * n


def _bmm(shapes: list[Shape]) -> tuple[int, int]:
    (b, m, k), (_, _, n) = shapes[:3][:2]
    return 2 * b * m * k * n, b * m * n


def _linear(shapes: list[Shape]) -> tuple[int, int]:
    x, weight = shapes[:2]
    rows = math.prod(x[:-1])
    return 2 * rows * weight[1] * weight[0], rows * weight[0]


def _attention(shapes: list[Shape]) -> tuple[int, int]:
    (b, h, t, d), (_, _, s, _) = shapes[:2]
    return 4 * b * h * t * s * d, b * h * t * d


def _attention_backward(shapes: list[Shape]) -> tuple[int, int]:
    (b, h, t, d), (_, _, s, _) = shapes[1:3]  # the output's gradient comes first
    return 8 * b * h * t * s * d, b * h * (t + 2 * s) * d


# Operators with matrix products in them: shapes of the tensor arguments -> (operations, elements written).
_FORMULAS: dict[str, Callable[[list[Shape]], tuple[int, int]]] = {
    "mm": _mm,
    "addmm": lambda shapes: _mm(shapes[1:]),
    "bmm": _bmm,
    "baddbmm": lambda shapes: _bmm(shapes[1:]),
    "mkldnn_linear": _linear,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_flash_attention_backward": _attention_backward,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_efficient_attention_backward": _attention_backward,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_cudnn_attention_backward": _attention_backward,
    "_flash_attention_forward": lambda shapes: _attention([(b, h, t, d) for b, t, h, d in shapes[:2]]),
    "_flash_attention_backward": lambda shapes: _attention_backward([(b, h, t, d) for b, t, h, d in shapes[:3]]),
}

Times = dict[int, tuple[float, set[str]]]


def _self_times(operators: list[dict]) -> Times:
    """Each operator's duration less that of the operators it calls, in microseconds."""
    own: Times = {}
    by_thread: dict[object, list[int]] = defaultdict(list)
    for index, event in enumerate(operators):
        by_thread[event["tid"]].append(index)
    for indices in by_thread.values():
        open_calls: list[int] = []
        for index in sorted(indices, key=lambda index: (operators[index]["ts"], -operators[index]["dur"])):
            event = operators[index]
            while open_calls and _end(operators[open_calls[-1]]) <= event["ts"]:
                open_calls.pop()
            own[index] = (event["dur"], set())
            if open_calls:
                parent = open_calls[-1]
                own[parent] = (own[parent][0] - event["dur"], set())
            open_calls.append(index)
    return own


def _device_times(events: list[dict], operators: list[dict]) -> Times:
    """The device kernels' time, given to the operator that launched them, in microseconds."""
    by_id = {event.get("args", {}).get("External id"): index for index, event in enumerate(operators)}
    times: Times = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            index = by_id.get(event["args"].get("External id"))
            if index is not None:
                spent, names = times.get(index, (0.0, set()))
                times[index] = (spent + event["dur"], names | {event["name"]})
    return times


def _end(event: dict) -> float:
    return event["ts"] + event["dur"]


def render(
    kernels: list[Kernel], measured: dict[str, object], dtype: str, seconds: float, title: str, shape: dict[str, object]
) -> str:
    """The per-kernel table as text."""
    total = sum(kernel.seconds for kernel in kernels)
    shown = [kernel for kernel in kernels if kernel.seconds >= _LEAST_SHARE * total]
    rest = kernels[len(shown) :]
    bandwidth = measured["copy"]["bytes_per_s"]
    heads = ("kernel", "calls", "time", "of all", "GFLOP/s", "GB/s", "of peak")
    rows = [_row(kernel, total, _gemm(measured, dtype), bandwidth) for kernel in shown]
    if rest:
        spent = sum(kernel.seconds for kernel in rest)
        rows.append(
            (
                f"{len(rest)} others",
                "",
                numbers.seconds(spent) if spent else "0",
                numbers.share(spent / total),
                "",
                "",
                "",
            )
        )
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    lines = [_line(row, widths) for row in (heads, *rows)]
    sizes = ", ".join(f"{name} {value}" for name, value in shape.items())
    gemm, copy = numbers.rate(_gemm(measured, dtype)), numbers.digits(bandwidth / 1e9)
    head = (
        title,
        sizes,
        f"one call: {numbers.seconds(seconds)}; the kernels below, under the profiler: {numbers.seconds(total)}",
        f"ceilings: GEMM {gemm} TFLOP/s, copy {copy} GB/s",
        "",
    )
    return "\n".join((*head, *lines))


def _row(kernel: Kernel, total: float, gemm: float, bandwidth: float) -> tuple[str, ...]:
    work, moved = kernel.flops / kernel.seconds, kernel.bytes / kernel.seconds
    shares = {"c": work / gemm, "m": moved / bandwidth}
    limit = max(shares, key=shares.get)
    return (
        kernel.name.removeprefix("aten::"),
        f"{kernel.count:.4g}",
        numbers.seconds(kernel.seconds),
        numbers.share(kernel.seconds / total),
        numbers.digits(work / 1e9) if work else "-",
        numbers.digits(moved / 1e9) if moved else "-",
        f"{numbers.share(shares[limit])} {limit}" if moved else "-",
    )


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(row, widths, strict=True)
    return (f"{first[0]:<{first[1]}}" + "".join(f"  {text:>{width}}" for text, width in others)).rstrip()


def _gemm(measured: dict[str, object], dtype: str) -> float:
    return measured["gemm"][dtype]["flops_per_s"]
