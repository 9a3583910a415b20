"""The steps of a suite as data, the most telling first. Each is a command that can be run by hand."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import macaron_ops
from macaron_ops import native
from macaron_ops.native.cuda import library

from .. import ffn_tiles, numbers
from ..group import EAGER, OURS
from ..lines import aligned
from ..presets import PRESETS

CHECKOUT = Path(macaron_ops.__file__).resolve().parent.parent
PROCESSES = max(1, min(14, (os.cpu_count() or 1) - 2))  # of what compiles; each holds a context on the GPU
SECONDS = 0.25  # to look at a variant: on a GPU medians settle soon


@dataclass(frozen=True)
class Step:
    """`command(folder)` is run by Python and leaves what it finds in `folder`. `seconds` is a guess at how long that
    takes, `least` the time with which it is worth beginning, `limit` that after which it hangs; `why_not` says what it
    lacks."""

    name: str
    about: str
    seconds: int
    least: int
    limit: int
    command: Callable[[Path], list[str]]
    why_not: Callable[[], str | None] = lambda: None
    reads_tests: bool = False  # so that a change of the tests makes its result old


def bench(suite: str, *arguments: str) -> Callable[[Path], list[str]]:
    def command(folder: Path) -> list[str]:
        return ["-m", "macaron_ops", "bench", suite, "--device", "cuda", *arguments, "--out", str(folder), "--resume"]

    return command


def _in(dtype: str, suite: str, backends: Sequence[str], *filters: str) -> Callable[[Path], list[str]]:
    chosen = [argument for each in filters for argument in ("--filter", each)]
    asked = [argument for each in backends for argument in ("--backend", each)]
    ahead = ("--compile-ahead", str(PROCESSES))
    return bench(suite, "--dtype", dtype, "--seconds", str(SECONDS), *asked, *ahead, *chosen)


def _beside_triton(
    why_not: Callable[[], str | None], chosen: str, dtype: str = "bfloat16"
) -> Callable[[Path], list[str]]:
    """The CUDA library's kernels beside Triton's where they are; Triton's are timed all the same."""

    def command(folder: Path) -> list[str]:
        return _in(dtype, "ops", ("triton",) if why_not() else ("triton", "cuda"), chosen)(folder)

    return command


def _why_no_tests() -> str | None:
    if not CHECKOUT.joinpath("tests", "conftest.py").exists():
        return "this is not a checkout: there are no tests"
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def _sanitizer(tool: str) -> Callable[[Path], list[str]]:
    return lambda folder: ["-m", "macaron_ops.bench.gpu_suite.sanitizer", tool, str(folder)]


def _why_no_sanitizer() -> str | None:
    from . import sanitizer  # which needs this module's CHECKOUT

    return _why_no_tests() or sanitizer.why_not()


def _why_no_build() -> str | None:
    if not CHECKOUT.joinpath("tools", "build_native.py").exists():
        return "this is not a checkout: there is nothing to build"
    return "it is built" if native.library() and not native.newer_sources() else None


STEPS = (
    Step(
        "ceilings",
        "copy bandwidth and rate of matrix products",
        seconds=20,
        least=15,
        limit=120,
        command=bench("ceilings", "--dtype", "bfloat16", "--dtype", "float16", "--dtype", "float32"),
    ),
    Step(
        "ffn",
        "ffn_step over 16,384 tokens against eager, torch.compile and the bare products",
        seconds=95,
        least=40,
        limit=400,
        command=_in("bfloat16", "ops", ("triton",), *(f"ops/ffn_step {preset}/" for preset in PRESETS)),
    ),
    Step(
        "wide",
        "ffn_step at D=1024, F=4096: Triton's and CUTLASS's, against the same",
        seconds=30,
        least=20,
        limit=200,
        command=_beside_triton(ffn_tiles.why_not, "ops/ffn_step wmt-big F="),
    ),
    Step(
        "ngpt",
        "an nGPT layer over 4 x 4,096 tokens against a pre-norm layer, ours and eager",
        seconds=25,
        least=20,
        limit=200,
        command=_in("bfloat16", "ngpt", ("auto",), *(f"/forward+backward/{kind}" for kind in (EAGER, OURS))),
    ),
    Step(
        "space",
        "262,144 particles in space, CUDA's and Triton's, beside pykeops where it is installed",
        seconds=15,
        least=10,
        limit=120,
        command=_beside_triton(library.why_not_loaded, "D=3, 262,144 particles/", "float32"),
    ),
    Step(
        "tiles",
        "each tile of CUTLASS's products against cuBLAS",
        seconds=25,
        least=20,
        limit=120,
        command=lambda folder: ["-m", "macaron_ops.bench.ffn_tiles", str(folder)],
        why_not=ffn_tiles.why_not,
    ),
    Step(
        "rows",
        "row kernels at 1, 64 and 256 MB, CUDA's and Triton's, against eager and the copy bandwidth",
        seconds=100,
        least=25,
        limit=400,
        command=_beside_triton(library.why_not_loaded, " MB/"),
    ),
    Step(
        "tests",
        "the tests marked gpu",
        seconds=150,
        least=60,
        limit=600,
        command=lambda folder: ["-m", "macaron_ops.bench.gpu_suite.gpu_tests", str(folder), str(PROCESSES)],
        why_not=_why_no_tests,
        reads_tests=True,
    ),
    Step(
        "layers",
        "Lie-Trotter and Strang layers, each operator on its best backend",
        seconds=200,
        least=60,
        limit=600,
        command=_in("bfloat16", "layers", ("auto",)),
    ),
    Step(
        "ops",
        "the other operators against their eager forms",
        seconds=120,
        least=40,
        limit=600,
        command=_in(
            "bfloat16", "ops", (), "attend_step", *(f"ops/normalize_step {p}" for p in ("wmt", "bert", "conf"))
        ),
    ),
    Step(
        "memcheck",
        "accesses of memory in the tests of the CUDA kernels, by compute-sanitizer",
        seconds=600,
        least=60,
        limit=1800,
        command=_sanitizer("memcheck"),
        why_not=_why_no_sanitizer,
        reads_tests=True,
    ),
    Step(
        "racecheck",
        "accesses of shared memory that no barrier orders, there too",
        seconds=600,
        least=60,
        limit=1800,
        command=_sanitizer("racecheck"),
        why_not=_why_no_sanitizer,
        reads_tests=True,
    ),
    Step(
        "native",
        "the CPU kernels, which nothing above needs: tools/build_native.py",
        seconds=60,
        least=30,
        limit=600,
        command=lambda folder: [str(Path("tools", "build_native.py"))],
        why_not=_why_no_build,
    ),
)


def listing(chosen: Sequence[Step]) -> list[str]:
    """The steps in order, with the time that each takes."""
    totals = map(numbers.clock_time, accumulate(step.seconds for step in chosen))
    cells = [(step.name, f"{step.seconds} s", total) for step, total in zip(chosen, totals, strict=True)]
    lines = aligned([("step", "takes", "in all"), *cells])
    return [f"{line}  {what}" for line, what in zip(lines, ("about", *map(_what, chosen)), strict=True)]


def _what(step: Step) -> str:
    lacking = step.why_not()
    return f"{step.about} (left out: {lacking})" if lacking else step.about


def environment() -> dict[str, str]:
    """Of a step's process: this Python finds the same macaron_ops, and nothing reaches for the network."""
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def python(step: Step, folder: Path) -> list[str]:
    return [sys.executable, *step.command(folder)]
