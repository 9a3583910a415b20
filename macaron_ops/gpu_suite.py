"""`macaron-ops gpu-suite`: its arguments; the work is done in bench/gpu_suite/."""

from __future__ import annotations

import argparse
from pathlib import Path

_EXAMPLES = """examples:
  macaron-ops gpu-suite --list                              the steps, in order, with the time each takes
  macaron-ops gpu-suite --out results/h100 --minutes 10     what fits in ten minutes
  macaron-ops gpu-suite --out results/h100                  goes on with it: what is there is not done again
  macaron-ops gpu-suite --out results/h100 --only ceilings,ffn

In a checkout `python -m macaron_ops gpu-suite` needs torch, numpy and triton alone, no installation and no network.

exit codes:
  0 nothing failed (what there was no time for is in the summary)   1 a gpu test, a measurement or a step failed
  2 usage, or no GPU   130 interrupted: the same command goes on"""


def add(commands: argparse._SubParsersAction) -> None:
    suite = commands.add_parser(
        "gpu-suite",
        help="all that a GPU is wanted for, on a machine that has one for minutes",
        description=_run.__doc__,
        epilog=_EXAMPLES,
    )
    suite.add_argument("--out", type=Path, metavar="DIR", help="where the results are, and where a later call goes on")
    suite.add_argument(
        "--minutes", type=_minutes, metavar="N", help="end within this time: steps are cut or left for a later call"
    )
    suite.add_argument("--only", type=lambda text: text.split(","), metavar="STEP,STEP", help="only these steps")
    suite.add_argument("--list", action="store_true", help="show the steps and do nothing")
    suite.set_defaults(run=_run)


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected minutes above 0, got {text!r}")
    return value


def _run(given: argparse.Namespace) -> int:
    """Measure the ceilings, ffn_step and the row kernels, run the tests marked gpu, measure layers and operators: one
    step after another, the most telling first, each in a process of its own, all results in one folder."""
    import torch

    from . import cli
    from .bench import session
    from .bench.gpu_suite import run, steps, summary

    chosen = [step for step in steps.STEPS if not given.only or step.name in given.only]
    known = {step.name for step in steps.STEPS}
    for name in given.only or ():
        if name not in known:
            raise cli.UsageError(f"--only {name!r}: expected some of {','.join(step.name for step in steps.STEPS)}")
    if given.list:
        print("\n".join(steps.listing(chosen)))
        return cli.FINISHED
    if given.out is None:
        raise cli.UsageError("--out DIR: where should the results go?")
    if not torch.cuda.is_available():
        raise cli.UsageError(f"gpu-suite needs a GPU: torch {torch.__version__} sees no CUDA device")
    try:
        folder = session.make_folder(given.out, resume=True).resolve()
    except session.UnwritableFolder as error:
        raise cli.UsageError(str(error)) from None
    records = run.run(folder, chosen, torch.device("cuda"), given.minutes)
    print(f"\n{(folder / 'summary.md').read_text()}\nEverything is in {folder}")
    return summary.exit_code(records)
