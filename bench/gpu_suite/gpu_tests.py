"""The tests marked `gpu` in several processes, for most of their time goes into compiling kernels on the host.

    python -m macaron_ops.bench.gpu_suite.gpu_tests FOLDER PROCESSES [PYTEST'S ARGUMENTS]     FOLDER/tests.json

Each process takes every so manieth test (`MACARON_OPS_TEST_PART`, see tests/conftest.py). A file that cannot be
imported for want of a package is left out by name; any other error is a failure.
"""

from __future__ import annotations

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
_COUNTS = ("passed", "failed", "skipped")
_GRACE = 8.0  # seconds for all processes to report in, once interrupted: fewer than the suite gives this one


def run(folder: Path, processes: int, arguments: Sequence[str] = ("-m", "gpu", "tests")) -> dict[str, object]:
    """Runs the tests and writes what came of them, also where it is interrupted."""
    reports = [folder / f"tests-{i + 1}.xml" for i in range(processes)]
    for report in reports:
        report.unlink(missing_ok=True)
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
    found["interrupted"] = interrupted
    (folder / FILE_NAME).write_text(json.dumps(found, indent=1) + "\n")
    return found


def _start(index: int, report: Path, processes: int, arguments: Sequence[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return subprocess.Popen(
        [*command, "--tb=short", f"--junitxml={report}", *arguments],
        cwd=CHECKOUT,
        env=os.environ | {"MACARON_OPS_TEST_PART": f"{index + 1}/{processes}"},
    )


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
        found["skipped" if case.find("skipped") is not None else "passed"] += 1
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
