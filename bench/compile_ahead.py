"""Compiling in many processes what a run would compile one after another, before it times anything.

Triton and torch.compile keep on disk what they compiled. Each process here runs some of the run's compiled variants
once; the run itself then finds them there.

    python -m macaron_ops.bench.compile_ahead 3/8 bench ops --device cuda ...     the third of eight processes
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import torch

from .group import COMPILED, OURS, REFERENCE

_ONE_COMPILER = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # a process, of which there are enough


def run(arguments: Sequence[str], processes: int) -> None:
    """Runs what `bench` with these arguments would compile. What fails to compile fails again, and is told, later."""
    commands = [[sys.executable, "-m", __spec__.name, f"{i + 1}/{processes}", *arguments] for i in range(processes)]
    running = [subprocess.Popen(command, env=os.environ | _ONE_COMPILER) for command in commands]
    try:
        for process in running:
            process.wait()
    finally:
        for process in running:
            process.kill()


def main(part: str, arguments: Sequence[str]) -> None:
    """One of the processes."""
    from macaron_ops import cli

    from . import session

    index, processes = map(int, part.split("/"))
    given = cli.parser().parse_args(arguments)
    options = cli.bench_options(given)
    compiled = [
        (job.group, name)
        for job in session.plan(cli.suites(given), options)
        for name in job.names
        if name.startswith((OURS, COMPILED)) and REFERENCE not in name
    ]
    for group, name in compiled[index - 1 :: processes]:
        said = f"compiled ahead: {' '.join(group.words(name))}"
        try:
            (variant,) = group.build([name])
            variant.prepare().call()
            if options.device.type == "cuda":
                torch.cuda.synchronize(options.device)
                torch.cuda.empty_cache()
        except Exception as error:  # its row in the run will say so
            said = f"not {said}: {type(error).__name__}: {error}"
        print(said, flush=True)
        torch._dynamo.reset()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
