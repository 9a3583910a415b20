"""One step after another, each a process of its own: one that fails, hangs or loses the device stops no other.

A folder holds `steps/<name>/` with a step's record, log and results. What is there and still holds is not done again:
a second call with the same folder goes on, and does again what was measured on another device, with another driver,
with other versions or other code.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from macaron_ops.cli import FAILED, FINISHED, INTERRUPTED, USAGE

from .. import environment, numbers, results
from . import record, steps, summary
from .record import Record
from .steps import Step

_GRACE = 10.0  # seconds to stop in, once asked to; a kernel that hangs never does
_LAST = 10.0  # seconds kept for the report
Clock = Callable[[], float]


def run(
    folder: Path,
    chosen: Sequence[Step],
    device: torch.device,
    minutes: float | None = None,
    clock: Clock = time.monotonic,
    say: Callable[[str], None] = print,
) -> list[Record]:
    """Does the steps in order, within `minutes` if they are given. Whatever stops it, there is a summary."""
    here = environment.record(device)
    end = clock() + 60 * minutes - _LAST if minutes else None
    found: list[Record] = []
    try:
        for index, step in enumerate(chosen):
            left = end - clock() if end is not None else None
            spare = f", {numbers.clock_time(max(left, 0))} left" if left is not None else ""
            say(f"[{index + 1}/{len(chosen)}] {step.name}: {step.about} (about {step.seconds} s{spare})")
            found.append(_step(step, folder / "steps" / step.name, here, left, clock, say))
            say(f"      {found[-1].status}{': ' * bool(found[-1].reason)}{found[-1].reason}")
            summary.write(folder, _all(folder, found, here), here)
    finally:
        summary.write(folder, _all(folder, found, here), here, report=True)
    return found


def _all(folder: Path, found: Sequence[Record], here: dict[str, object]) -> list[Record]:
    """With what other calls left that still holds, in the order of the steps."""
    there = [record.load(path) for path in sorted(folder.joinpath("steps").glob("*"))]
    every = {each.step: each for each in there if each and record.holds(each, here)}
    every |= {each.step: each for each in found}
    order = [step.name for step in steps.STEPS]
    return sorted(every.values(), key=lambda each: order.index(each.step) if each.step in order else len(order))


def _step(
    step: Step, folder: Path, here: dict[str, object], left: float | None, clock: Clock, say: Callable[[str], None]
) -> Record:
    """Does what of a step is not there yet, and records it."""
    folder.mkdir(parents=True, exist_ok=True)
    now, command = record.surroundings(step, here), step.command(Path("DIR"))
    old = record.load(folder)
    if old and old.environment and (why := old.why_old(command, now)):
        say(f"      again, for what is there no longer holds: {why}")
        shutil.rmtree(folder)
        folder.mkdir()
        old = None
    if old and old.status in record.FINAL:
        return old
    lacking = step.why_not()
    if lacking:
        return _recorded(folder, Record(step.name, record.LEFT_OUT, lacking))
    before = old.seconds if old else 0.0
    if left is not None and left < step.least:
        reason = f"{max(left, 0):.0f} s are left, it needs {step.least} s at least"
        kept = (before, old.command, old.exit_code, old.environment) if old else ()
        return _recorded(folder, Record(step.name, record.SKIPPED, reason, *kept))
    limit = step.limit if left is None else min(step.limit, left)
    say(f"      log: {folder / record.LOG}")
    _recorded(folder, Record(step.name, record.CUT, "this process ended before it", before, command, None, now))
    begin = clock()
    code = _in_process(step, folder, limit, clock)
    status, reason = _outcome(code, limit, limit < step.limit, folder)
    return _recorded(folder, Record(step.name, status, reason, before + clock() - begin, command, code, now))


def _recorded(folder: Path, found: Record) -> Record:
    found.write(folder)
    return found


def _outcome(code: int | None, limit: float, short: bool, folder: Path) -> tuple[str, str]:
    if code is None:
        return (record.CUT if short else record.HUNG), f"stopped after {limit:.0f} s"
    if code == FINISHED:
        return record.DONE, ""
    if code == FAILED:
        return record.FAILED, f"something in it was wrong: {folder / record.LOG}"
    return record.CRASHED, f"it ended with {code}: {_last_line(folder)}"


def _last_line(folder: Path) -> str:
    lines = (folder / record.LOG).read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "without a word"


def _in_process(step: Step, folder: Path, limit: float, clock: Clock) -> int | None:
    """Runs a step; again as long as it crashes or loses the device in one measurement and goes on past it. None: out of
    time."""
    end, rows = clock() + limit, -1
    while True:
        code = _process(steps.python(step, folder), folder / record.LOG, max(end - clock(), 0.0))
        measured = _rows(folder)
        if code in (None, FINISHED, FAILED, USAGE, INTERRUPTED) or measured <= rows:
            return code
        rows = measured


def _rows(folder: Path) -> int:
    path = folder / results.FILE_NAME
    return len(results.load(path)["rows"]) if path.exists() else 0


def _process(command: Sequence[str], log: Path, limit: float) -> int | None:
    """The exit code of a process with its own group, whose output goes to the log; None where it had to be stopped."""
    with log.open("a") as output:
        print(f"$ {shlex.join(command)}", file=output, flush=True)
        process = subprocess.Popen(
            command,
            cwd=steps.CHECKOUT,
            env=steps.environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _stop(process)


def _stop(process: subprocess.Popen) -> None:
    """Asks the process and all it started to end, so that they write what they have; then makes sure."""
    for sign, patience in ((signal.SIGINT, _GRACE), (signal.SIGKILL, _GRACE)):
        if process.poll() is None:
            os.killpg(process.pid, sign)
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
    try:
        os.killpg(process.pid, signal.SIGKILL)  # what it left running
    except ProcessLookupError:
        pass
