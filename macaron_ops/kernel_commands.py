"""The commands `inspect-kernels` and `tune`. Arguments are read here; the work is done in bench/."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
from contextlib import nullcontext
from pathlib import Path

from .cli import FAILED, FINISHED, UsageError, _ask, _device, _known, _require

__all__ = ["add"]

_ARCHITECTURES = ("sm80", "sm90", "sm100", "gfx942")

_INSPECT_EXAMPLES = """examples:
  macaron-ops inspect-kernels                                     Hopper: a few calls that show every kernel
  macaron-ops inspect-kernels --arch sm80 --arch gfx942 --dtype bfloat16 --dtype float32
  macaron-ops inspect-kernels --kernel 'hidden_*' --shape 16384,512,2048
  macaron-ops inspect-kernels --every --jobs 8                    each tile of the tables, each activation and dtype
  macaron-ops inspect-kernels --kernel narrow_ffn_kernel --source sass

A shape is tokens,D,F. The columns: registers and bytes of stack of a thread (stack means spilled registers), shared
memory of a block, instructions of the matrix units (wgmma: Hopper's and Blackwell's; mma: the older ones and AMD's),
bulk copies by TMA, and all instructions of the machine code. A kernel breaks a rule if it needs more shared memory than
a block can have, spills (norm_backward may, up to 24 bytes, and two more on Blackwell), multiplies 16-bit matrices
without matrix instructions, has an atomic operation, or reads a register that nothing wrote (an error of ptxas); on
Hopper also if it uses the older matrix instructions, or moves long rows by fewer than 16 bytes a thread.

exit codes:
  0 no kernel breaks a rule   1 one does, or does not compile   2 usage"""

_TUNE_EXAMPLES = """examples:
  macaron-ops tune --dry-run                                  what would be tried here
  macaron-ops tune --dry-run --arch sm90                      ... on a GPU that is not here
  macaron-ops tune --minutes 20                               the usual FFN shapes in bfloat16, as far as time allows
  macaron-ops tune --preset bert-base --preset wmt-big --dtype bfloat16 --dtype tf32
  macaron-ops tune --product linear --shape 16384,1024,4096   one product: an (M, N) result, a sum over K
  macaron-ops tune --out h100.json && MACARON_OPS_TILES=h100.json macaron-ops bench ops

Each candidate is compiled (out if it spills or does not fit), checked against float64 by the benchmarks' rule (out if
it is wrong), and timed as the replay of a CUDA graph, interleaved with the tile that the tables have now; the best are
timed again for longer. A tile is replaced only by one whose 80th percentile is below its 20th, and which compiles as
well with dropout and the other activations, where they take the same entry. Every problem's entry,
with its time and environment, is in the table as soon as it is found; the same command goes on where it stopped.

Without --out the table goes into the package, where every later process finds it. Shapes that are not in it take the
nearest entry, within a factor of 4 in M, N and K; else a tile of the architecture, which was chosen without a clock.

exit codes:
  0 finished, or out of time with what it has   1 a present tile computed something else   2 usage   130 interrupted"""


def add(commands: argparse._SubParsersAction) -> None:
    _add_inspect(commands)
    _add_tune(commands)


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    inspect = commands.add_parser(
        "inspect-kernels",
        help="what the compiled Triton kernels use: registers, spills, shared memory, instructions; no GPU needed",
        description=_inspect.__doc__,
        epilog=_INSPECT_EXAMPLES,
    )
    inspect.add_argument(
        "--arch",
        action="append",
        default=[],
        metavar="ARCH",
        help=f"{', '.join(_ARCHITECTURES)}; may be given again (default: sm90)",
    )
    inspect.add_argument("--kernel", default="*", metavar="GLOB", help="only kernels of this name, e.g. 'norm_*'")
    inspect.add_argument(
        "--shape", action="append", default=[], type=three, metavar="M,D,F", help="tokens, width and hidden width"
    )
    inspect.add_argument(
        "--dtype", action="append", default=[], help="bfloat16, float16, float32 or tf32; may be given again"
    )
    inspect.add_argument("--every", action="store_true", help="every tile of the tables in every use (takes minutes)")
    inspect.add_argument("--jobs", type=int, default=1, metavar="N", help="compile in so many processes (default: 1)")
    output = inspect.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="a JSON list in place of the table")
    output.add_argument("--source", metavar="KIND", help="the kernels' code: ttgir, ptx, sass or amdgcn")
    inspect.set_defaults(run=_inspect)


def _add_tune(commands: argparse._SubParsersAction) -> None:
    tune = commands.add_parser(
        "tune",
        help="find the fastest tiles of the Triton kernels on this GPU, and write them as a table",
        description=_tune.__doc__,
        epilog=_TUNE_EXAMPLES,
    )
    tune.add_argument("--device", default="auto", help="cuda, cuda:1; cpu: Triton's interpreter, to try the command")
    tune.add_argument(
        "--product", action="append", default=[], help="hidden, gated, hidden_backward, linear, weight, ..."
    )
    what = tune.add_mutually_exclusive_group()
    what.add_argument("--shape", action="append", default=[], type=three, metavar="M,N,K", help="of a product")
    what.add_argument(
        "--preset", action="append", default=[], help="the FFN steps of iwslt, wmt-base, bert-base, conformer-s, ..."
    )
    tune.add_argument("--dtype", action="append", default=[], help="bfloat16 (the default), float16, float32 or tf32")
    tune.add_argument(
        "--minutes", type=float, default=math.inf, metavar="BUDGET", help="stop in time with what there is"
    )
    tune.add_argument("--again", action="store_true", help="also what the table has already")
    tune.add_argument("--out", type=Path, metavar="FILE", help="the table (default: this device's in the package)")
    tune.add_argument("--dry-run", action="store_true", help="list what would be tried, and stop")
    tune.add_argument("--arch", metavar="ARCH", help=f"with --dry-run: {', '.join(_ARCHITECTURES)}")
    tune.set_defaults(run=_tune, threads=None)


def three(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected three numbers above 0 as in 16384,1024,4096, got {text!r}")
    return tuple(map(int, parts))


def _inspect(given: argparse.Namespace) -> int:
    """Compile the Triton kernels that the operators would launch, for GPUs that need not be there: what they use."""
    architectures = [_known("--arch", name, _ARCHITECTURES) for name in given.arch or ["sm90"]]
    _require_compiler(architectures)
    if given.source is None and not given.json:
        _require(("rich",))
    from .bench import kernel_report
    from .bench.kernel_calls import DTYPES, Wanted

    dtypes = tuple(_known("--dtype", name, DTYPES) for name in given.dtype)
    wanted = Wanted(tuple(given.shape), dtypes, given.every)
    if given.source is not None:
        kind = given.source
        for name in architectures:
            _known("--source", kind, ("ttgir", "amdgcn") if name.startswith("gfx") else ("ttgir", "ptx", "sass"))
        found = [text for a in architectures for text in kernel_report.source(a, wanted, given.kernel, kind)]
        print("\n".join(found))
        return FINISHED if found else _none(given.kernel)
    rows = kernel_report.inspect(architectures, wanted, given.kernel, given.jobs)
    if not rows:
        return _none(given.kernel)
    print(kernel_report.as_json(rows)) if given.json else kernel_report.draw(rows)
    return FAILED if any(row.faults for row in rows) else FINISHED


def _tune(given: argparse.Namespace) -> int:
    """Find the fastest tile of each product of the Triton kernels on this GPU, and write them as a table."""
    if given.arch and not given.dry_run:
        raise UsageError("--arch is for --dry-run: tiles are timed on the GPU that is here")
    _require_module("triton")
    device = None if given.arch else _tunable_device(given)
    import torch

    from .bench.kernel_calls import DTYPES, PROCESSORS
    from .bench.presets import PRESETS
    from .bench.timing import clock_for
    from .bench.tuning import journal, session
    from .bench.tuning.progress import Bar
    from .bench.tuning.work import PRODUCTS
    from .kernels.device import recording

    dtypes = [_known("--dtype", name, DTYPES) for name in given.dtype or ["bfloat16"]]
    products = [_known("--product", name, PRODUCTS) for name in given.product]
    presets = [_known("--preset", name, PRESETS) for name in given.preset]
    found = session.plan(device or torch.device("cuda"), dtypes, products, given.shape, presets)
    if given.dry_run:
        arch = _known("--arch", given.arch, _ARCHITECTURES) if given.arch else None
        with recording(arch, PROCESSORS[arch]) if arch else nullcontext():
            print("\n".join(session.plan_lines(found, device or torch.device("cuda"))))
        return FINISHED
    path = given.out or journal.default_path(device)
    clock = clock_for(device)
    table = _ask(journal.Unusable, journal.Journal, path, device, clock)
    with Bar(len(found)) as bar:
        summary = session.run(found, device, clock, table, seconds=60 * given.minutes, again=given.again, watch=bar)
    print("\n".join(session.told(summary)))
    return FAILED if summary.wrong else FINISHED


def _tunable_device(given: argparse.Namespace):
    device = _device(given)
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UsageError(
            "tuning needs a GPU, and torch sees none here. `--dry-run --arch sm90` lists what would be tried on one; "
            "with TRITON_INTERPRET=1 the whole command runs in Triton's interpreter, whose times mean nothing"
        )
    return device


def _none(pattern: str) -> int:
    raise UsageError(f"--kernel {pattern!r}: no kernel that these calls launch has such a name")


def _require_compiler(architectures: list[str]) -> None:
    """Triton, not interpreting, with the parts that compile for the architectures."""
    _require_module("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError("TRITON_INTERPRET=1 is set: Triton would interpret the kernels, not compile them; unset it")
    from triton.backends import backends

    needed = {"amd" if name.startswith("gfx") else "nvidia" for name in architectures}
    if missing := sorted(needed - set(backends)):
        raise UsageError(
            f"this Triton has no compiler for {', '.join(missing)}; it has {', '.join(backends) or 'none'}"
        )


def _require_module(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise UsageError(f"{name} is not installed here: pip install {name}")
