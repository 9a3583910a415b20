"""What the fused backends are meant to reach, as data, and what of it a run reached.

A goal is a bound on one figure over the presets or workloads that its pattern matches: their median, or the worst of
them. Every figure is a ratio of medians of variants that ran interleaved, or a number of bytes or seconds. A goal whose
measurements a run does not have is not judged.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch

from . import numbers, table
from .group import AFTER, BEFORE, COMPILED, EAGER, KEOPS, OURS, PRODUCTS, SDPA
from .results import Row

SPEED = "speed"  # the denominator's time / this time: at least the bound
ACTIVATIONS = "activation memory"  # this / the denominator's: at most the bound
BYTES = "memory"  # peak bytes: at most the bound
TIME = "time"  # median seconds: at most the bound
LAUNCHED = "speed as launched"  # the same as speed, with what Python takes to launch the kernels
COPY = "share of copy bandwidth"  # of what must be read and written: at least the bound
_AT_LEAST = (SPEED, LAUNCHED, COPY)
MEDIAN, WORST = "median", "worst"


@dataclass(frozen=True)
class Goal:
    """`where` are suite, pattern of subjects, dtype and pass; `shape` is what a measurement's shape must hold, `tokens`
    how many tokens it must have."""

    what: str
    where: tuple[str, str, str, str]
    variant: str
    over: str | None
    bound: float
    figure: str = SPEED
    of: str = MEDIAN
    shape: dict[str, object] = field(default_factory=dict)
    tokens: int | None = None


NATIVE, TRITON, CUDA, AUTO = f"{OURS} native", f"{OURS} triton", f"{OURS} cuda", f"{OURS} auto"
LIE_TROTTER = f"{EAGER} Lie-Trotter"
_FORWARD, _TRAINING = "forward", "forward+backward"
_SPACE = ("ops", "sphere_attend_step D=3", "float32")
_MANY = ("ops", "sphere_attend_step D=3, 131,072 particles", "float32", _FORWARD)
_PARTICLES = {"shape": {"particles": 16384}}
_FFN = ("ops", "ffn_step *")
_LAYER = ("layers", "*")
_MODEL = ("model", "MiniLM-L6 *")

# On a GPU, in bfloat16 over 16,384 tokens; the bounds are for an H100.
_MANY_TOKENS = {"of": WORST, "tokens": 16384}
_WIDE, _CONFORMERS = "ffn_step wmt-big*", "ffn_step conformer-*"
_WHOLE = ("ops", "ffn_step wmt-big F=4096")
_ROWS = ("normalize_step", "layer_norm")
_CUDA_ROWS = (*_ROWS, "residual_norm", "rms_norm", "sphere_norm")
_SPHERE = ("ops", "sphere_attend_step D=64, 65,536 particles")
_MILLION = ("ops", "sphere_attend_step D=3, 1,048,576 particles", "float32", _FORWARD)
_BOUND_OF_A_MILLION = 0.30  # seconds of exponentials and of multiply-adds, each: csrc/cuda/sphere_attend_step.cu
_QUARTER = ("ops", "sphere_attend_step D=3, 262,144 particles", "float32", _FORWARD)
_BOUND_OF_A_QUARTER = _BOUND_OF_A_MILLION / 4**2  # pairs
_NGPT = ("ngpt", "*", "bfloat16", _TRAINING)
_SIZES = {"1 MB": "1 MB", "??* MB": "from 64 MB on"}


def _on_gpu(subjects: str, direction: str, over: str, bound: float) -> Goal:
    where = ("ops", subjects, "bfloat16", direction)
    return Goal(subjects.removesuffix("*").strip(" -"), where, TRITON, over, bound, **_MANY_TOKENS)


def _rows(
    kernel: str, size: str, direction: str, over: str | None, bound: float, figure: str, variant: str = TRITON
) -> Goal:
    where = ("ops", f"{kernel} {size}", "bfloat16", direction)
    return Goal(f"{kernel}, {_SIZES[size]}", where, variant, over, bound, figure, of=WORST)


def _long_layer(width: int, variant: str, over: str, bound: float, figure: str = SPEED) -> Goal:
    where = ("layers", f"long-{width}", "bfloat16", _TRAINING)
    return Goal(f"layer, D={width}, 1,024 tokens", where, f"{AUTO}{variant}", over, bound, figure)


_GPU_GOALS = (
    *(
        _long_layer(width, " Strang", over, bound)
        for width, by_eager in ((512, 1.5), (1024, 1.3))
        for over, bound in ((LIE_TROTTER, by_eager), (f"{COMPILED} Lie-Trotter", 1.1))
    ),
    *(_long_layer(width, " Strang", LIE_TROTTER, 0.7, ACTIVATIONS) for width in (512, 1024)),
    *(_long_layer(width, " lean Strang", LIE_TROTTER, 0.4, ACTIVATIONS) for width in (512, 1024)),
    Goal("particles, D=64", (*_SPHERE, "bfloat16", _FORWARD), TRITON, SDPA, 0.85),
    Goal("nGPT layer, 4,096 tokens", _NGPT, f"{AUTO} nGPT", f"{AUTO} pre-norm", 1 / 1.15, shape={"length": 4096}),
    *(
        goal
        for ours in (TRITON, CUDA)
        for goal in (
            Goal("262,144 particles in space", _QUARTER, ours, KEOPS, 2),
            Goal("262,144 particles in space", _QUARTER, ours, None, 2 * _BOUND_OF_A_QUARTER, TIME),
        )
    ),
    Goal("a million particles in space", _MILLION, CUDA, None, 2 * _BOUND_OF_A_MILLION, TIME),
    _on_gpu(_WIDE, _FORWARD, PRODUCTS, 1 / 1.08),
    _on_gpu(_WIDE, _FORWARD, EAGER, 1.3),
    _on_gpu(_WIDE, _FORWARD, COMPILED, 1.1),
    *(
        Goal("ffn_step, F=4096, by CUTLASS", (*_WHOLE, "bfloat16", _FORWARD), CUDA, over, bound, **_MANY_TOKENS)
        for over, bound in ((PRODUCTS, 1 / 1.05), (TRITON, 1.0))
    ),
    _on_gpu(_CONFORMERS, _FORWARD, EAGER, 1.8),
    _on_gpu(_CONFORMERS, _FORWARD, COMPILED, 1.25),
    _on_gpu(_FFN[1], _TRAINING, EAGER, 1.25),
    *(_rows(kernel, "??* MB", direction, None, 0.9, COPY) for kernel in _ROWS for direction in (_FORWARD, _TRAINING)),
    *(
        _rows(kernel, "1 MB", direction, EAGER, 1.0, figure)
        for kernel in _ROWS
        for direction in (_FORWARD, _TRAINING)
        for figure in (SPEED, LAUNCHED)
    ),
    *(
        goal
        for kernel in _CUDA_ROWS
        for direction in (_FORWARD, _TRAINING)
        for goal in (
            _rows(kernel, "??* MB", direction, None, 0.92, COPY, CUDA),
            _rows(kernel, "1 MB", direction, TRITON, 1.0, SPEED, CUDA),
            _rows(kernel, "1 MB", direction, TRITON, 1.0, LAUNCHED, CUDA),
        )
    ),
)

GOALS = (
    Goal("16,384 particles in space", (*_SPACE, _FORWARD), NATIVE, EAGER, 20, **_PARTICLES),
    Goal("16,384 particles in space", (*_SPACE, _FORWARD), NATIVE, SDPA, 3, **_PARTICLES),
    Goal("16,384 particles in space", (*_SPACE, _FORWARD), NATIVE, KEOPS, 40, **_PARTICLES),
    Goal("16,384 particles in space", (*_SPACE, _TRAINING), NATIVE, EAGER, 15, **_PARTICLES),
    Goal("131,072 particles in space", _MANY, NATIVE, None, 200e6, BYTES),
    Goal("ffn_step", (*_FFN, "float32", _FORWARD), NATIVE, EAGER, 1.2),
    Goal("ffn_step", (*_FFN, "float32", _FORWARD), NATIVE, EAGER, 1.0, of=WORST),
    Goal("ffn_step", (*_FFN, "float32", _FORWARD), NATIVE, PRODUCTS, 1 / 1.05),
    Goal("ffn_step", (*_FFN, "bfloat16", _FORWARD), NATIVE, EAGER, 1.3),
    Goal("Strang layer", (*_LAYER, "float32", _TRAINING), f"{NATIVE} Strang", LIE_TROTTER, 1.15),
    Goal("Strang layer", (*_LAYER, "bfloat16", _TRAINING), f"{NATIVE} Strang", LIE_TROTTER, 1.5),
    Goal("Strang layer", (*_LAYER, "float32", _TRAINING), f"{NATIVE} lean Strang", LIE_TROTTER, 0.4, ACTIVATIONS),
    Goal("Strang layer", (*_LAYER, "bfloat16", _TRAINING), f"{NATIVE} lean Strang", LIE_TROTTER, 0.4, ACTIVATIONS),
    Goal("MiniLM-L6", (*_MODEL, "float32", _FORWARD), AFTER, BEFORE, 1.0, of=WORST),
    Goal("MiniLM-L6", (*_MODEL, "bfloat16", _FORWARD), AFTER, BEFORE, 1.0, of=WORST),
    *_GPU_GOALS,
)


@dataclass(frozen=True)
class Finding:
    """A goal's figure for each subject of a run, and the bare products' time / this time for those that have it."""

    goal: Goal
    figures: dict[str, float]
    shares: tuple[float, ...]

    @property
    def figure(self) -> float:
        values = self.figures.values()
        if self.goal.of == MEDIAN:
            return statistics.median(values)
        return min(values) if self.goal.figure in _AT_LEAST else max(values)

    @property
    def met(self) -> bool:
        return self.figure >= self.goal.bound if self.goal.figure in _AT_LEAST else self.figure <= self.goal.bound

    @property
    def share(self) -> float | None:
        """Of this time, what the bare products alone take: median over the subjects."""
        return statistics.median(self.shares) if self.shares else None

    def cells(self) -> tuple[str, ...]:
        """What, how it did, against what, what was asked, whether it is met, the share: as text."""
        goal, write = self.goal, _write(self.goal)
        _, _, dtype, direction = goal.where
        of = f"{goal.of} " if "*" in goal.where[1] else ""
        possessive = "" if goal.figure in (SPEED, LAUNCHED) else "'s"
        over = f" over {goal.over}{possessive}" if goal.over else ""
        asked = f"{'at least' if goal.figure in _AT_LEAST else 'at most'} {write(goal.bound)}"
        return (
            f"{goal.what}: {goal.variant}, {direction} in {dtype}",
            f"{of}{goal.figure}{over}",
            f"{write(self.figure)}{self._range()}",
            asked,
            "met"
            if self.met
            else "slower, missed"
            if goal.figure in (SPEED, LAUNCHED) and self.figure < 1
            else "missed",
            numbers.share(self.share),
        )

    def _range(self) -> str:
        if len(self.figures) == 1:
            return ""
        write = _write(self.goal)
        low, high = min(self.figures, key=self.figures.get), max(self.figures, key=self.figures.get)
        return f" ({write(self.figures[low])} {low} to {write(self.figures[high])} {high}, {len(self.figures)} in all)"


COLUMNS = ("goal", "figure", "measured", "asked", "", "of products")


def findings(document: dict[str, object]) -> list[Finding]:
    """The goals that this run has measurements for."""
    rows = [row for row in document["rows"] if row["status"] == "ok"]
    found = (_judge(goal, rows) for goal in GOALS)
    return [finding for finding in found if finding.figures]


def told(document: dict[str, object]) -> list[str]:
    """The same, a line each."""
    lines = []
    for what, figure, measured, asked, verdict, share in (finding.cells() for finding in findings(document)):
        products = f", {share} of the bare products' speed" if share != numbers.share(None) else ""
        lines.append(f"{verdict}: {what}: {figure} {measured}, asked {asked}{products}")
    return lines


def _judge(goal: Goal, rows: list[Row]) -> Finding:
    figures, shares = {}, []
    for row in _matching(goal, rows):
        beside = {other["variant"]: other for other in rows if table.group_key(other) == table.group_key(row)}
        value = _figure(goal, row, beside.get(goal.over))
        if value is not None:
            figures[row["subject"].removeprefix(goal.where[1].removesuffix("*"))] = value
            if PRODUCTS in beside:
                shares.append(_speed(row, beside[PRODUCTS]))
    return Finding(goal, figures, tuple(shares))


def _matching(goal: Goal, rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        words = (row["suite"], row["subject"], row["dtype"], row["pass"])
        if row["variant"] == goal.variant and all(map(fnmatch, words, goal.where)):
            if goal.shape.items() <= row["shape"].items() and goal.tokens in (None, row["tokens"]):
                yield row


def _figure(goal: Goal, row: Row, over: Row | None) -> float | None:
    if goal.figure == BYTES:
        return float(row["memory"]["peak_bytes"])
    if goal.figure == TIME:
        return row["time"]["median"]
    if goal.figure == COPY:
        return row["extra"].get("share_of_copy")
    if over is None:
        return None
    if goal.figure == SPEED:
        return _speed(row, over)
    if goal.figure == LAUNCHED:
        mine, theirs = (timed["extra"].get("launched", timed["time"])["median"] for timed in (row, over))
        return theirs / mine
    mine, theirs = (weighed["memory"].get("activation_bytes") for weighed in (row, over))
    return mine / theirs if mine is not None and theirs else None


def _speed(row: Row, over: Row) -> float:
    return over["time"]["median"] / row["time"]["median"]


def _write(goal: Goal) -> Callable[[float], str]:
    writers = {BYTES: lambda value: f"{numbers.digits(value / 1e6)} MB", COPY: numbers.share, TIME: numbers.seconds}
    return writers.get(goal.figure, numbers.times)
