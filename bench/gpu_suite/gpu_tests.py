"""The tests marked `gpu` in several processes, for most of their time goes into compiling kernels on the host.

    python -m macaron_ops.bench.gpu_suite.gpu_tests FOLDER PROCESSES [PYTEST'S ARGUMENTS]     FOLDER/tests.json

Each process takes every so manieth test (`MACARON_OPS_TEST_PART`, see tests/conftest.py). A file that cannot be
imported for want of a package is left out by name; any other error is a failure.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from .steps import CHECKOUT

FILE_NAME = "tests.json"
_MISSING = re.compile(r"ModuleNotFoundError: No module named '([^']+)'")
LOST = "the GPU's context was lost"  # why tests/conftest.py skips what comes after, in the same process
_COUNTS = ("passed", "failed", "skipped")
_GRACE = 8.0  # seconds for all processes to report in, once interrupted: fewer than the suite gives this one


def run(folder: Path, processes: int, arguments: Sequence[str] = ("-m", "gpu", "tests")) -> dict[str, object]:
    """Runs the tests and writes what came of them, also where it is interrupted.

    A test that breaks the GPU's context ends its process's work: what the process left is done in new ones, and the
    test again by itself, each kernel told before it starts."""
    found = _round(folder, "tests", processes, arguments)
    lost, left = found.pop("lost"), found.pop("left")
    for again in itertools.count(2):
        if not left or found["interrupted"]:
            break
        more = _round(folder, f"tests-again-{again}", min(processes, len(left)), left)
        lost, left = lost + more.pop("lost"), more.pop("left")
        for name in (*_COUNTS, "failures", "interrupted"):  # what was left out was so before
            found[name] += more[name]
    for i, test in enumerate(() if found["interrupted"] else lost):
        found["failures"].append({"test": test, "why": _alone(folder / f"launches-{i + 1}.log", test)})
    found["interrupted"], found["left"] = bool(found["interrupted"]), left
    (folder / FILE_NAME).write_text(json.dumps(found, indent=1) + "\n")
    return found


def _round(folder: Path, name: str, processes: int, arguments: Sequence[str]) -> dict[str, object]:
    reports = [folder / f"{name}-{i + 1}.xml" for i in range(processes)]
    for report in reports:
        report.unlink(missing_ok=True)
        _lost_in(report).unlink(missing_ok=True)
    running = [_start(i, report, processes, arguments) for i, report in enumerate(reports)]
    interrupted = False
    try:
        codes = [process.wait() for process in running]
    except KeyboardInterrupt:  # pytest has it too, and reports what it has done
        interrupted, codes = True, _ended(running, time.monotonic() + _GRACE)
    finally:
        for process in running:
            process.kill()
    whole = [report for report in reports if _is_whole(report)]
    found = count(whole)
    for i, (code, report) in enumerate(zip(codes, reports, strict=True)):
        if report not in whole:
            found["failures"].append(
                {"test": f"process {i + 1} of {processes}", "why": f"it ended with {code} and left no report"}
            )
            found["failed"] += 1
    told = [line.split(" ", 1) for report in reports for line in _lines(_lost_in(report))]
    return found | {
        "interrupted": interrupted,
        "lost": [test for what, test in told if what == "lost"],
        "left": [test for what, test in told if what == "left"],
    }


def _alone(log: Path, test: str) -> str:
    """What ran when the context broke, of the test by itself; the driver leaves what it saw beside the log."""
    log.unlink(missing_ok=True)
    seen = {"CUDA_ENABLE_COREDUMP_ON_EXCEPTION": "1", "CUDA_ENABLE_LIGHTWEIGHT_COREDUMP": "1"}
    seen |= {"CUDA_COREDUMP_FILE": f"{log}.core", "CUDA_LAUNCH_BLOCKING": "1", "MACARON_OPS_LAUNCHES": str(log)}
    process = subprocess.run([*_pytest(), "-p", "tests.launches", test], cwd=CHECKOUT, env=os.environ | seen)
    if process.returncode == 0:
        return f"it broke the GPU's context; by itself, each kernel waited for, it passes ({log.name})"
    started = [line for line in _lines(log) if not line.startswith(" ")] or ["none of Triton's"]
    return f"it broke the GPU's context; by itself too, the last kernel ({log.name}): {started[-1][:2000]}"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _lost_in(report: Path) -> Path:
    return report.with_suffix(".lost")


def _start(index: int, report: Path, processes: int, arguments: Sequence[str]) -> subprocess.Popen:
    told = {"MACARON_OPS_TEST_PART": f"{index + 1}/{processes}", "MACARON_OPS_LOST_TESTS": str(_lost_in(report))}
    command = [*_pytest(), "--continue-on-collection-errors", f"--junitxml={report}", *arguments]
    return subprocess.Popen(command, cwd=CHECKOUT, env=os.environ | told)


def _pytest() -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]


def _ended(running: Sequence[subprocess.Popen], until: float) -> list[int]:
    """The exit codes; a process that has not ended by then is killed, and leaves no report."""
    codes = []
    for process in running:
        try:
            codes.append(process.wait(max(until - time.monotonic(), 0)))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(process.wait())
    return codes


def _is_whole(report: Path) -> bool:
    """A process that is killed while it writes leaves a part."""
    try:
        ElementTree.parse(report)
    except (OSError, ElementTree.ParseError):
        return False
    return True


def count(reports: Sequence[Path]) -> dict[str, object]:
    """Passed, failed, skipped; each failure's name and first line; files left out for want of a package."""
    found: dict[str, object] = dict.fromkeys(_COUNTS, 0) | {"failures": [], "left_out": []}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            _add(case, found)
    found["left_out"] = sorted(set(found["left_out"]))
    return found


def _add(case: ElementTree.Element, found: dict[str, object]) -> None:
    name = "::".join(filter(None, (case.get("classname"), case.get("name"))))
    bad = next((child for child in case if child.tag in ("failure", "error")), None)
    if bad is None:
        skipped = case.find("skipped")
        if skipped is None or not skipped.get("message", "").startswith(LOST):  # else another process does it
            found["passed" if skipped is None else "skipped"] += 1
        return
    missing = _MISSING.search(bad.text or "")
    if bad.tag == "error" and bad.get("message") == "collection failure" and missing:
        found["left_out"].append(f"{name}: {missing[1]} is not installed")
        return
    found["failed"] += 1
    found["failures"].append({"test": name, "why": (bad.get("message") or "").strip().split("\n")[0][:300]})


def main(folder: str, processes: str, *arguments: str) -> int:
    found = run(Path(folder), int(processes), *((arguments,) if arguments else ()))
    print(", ".join(f"{found[name]} {name}" for name in _COUNTS))
    return 130 if found["interrupted"] else int(found["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
