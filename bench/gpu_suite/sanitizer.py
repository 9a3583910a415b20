"""compute-sanitizer over the tests of the CUDA kernels, in pieces that a later call need not do again.

    python -m macaron_ops.bench.gpu_suite.sanitizer TOOL FOLDER [PYTEST'S ARGUMENTS]     FOLDER/sanitizer.json

memcheck finds accesses out of bounds and at wrong addresses: each tensor has its own allocation then, so that the next
one does not hide them. racecheck finds accesses of shared memory that no barrier orders; it looks at the hand-written
kernels alone, for it does not know all that orders those of CUTLASS. A piece is some tests in a process of its own with
a limit of time. It is clean by the tool's own summary, where tests passed and none failed; all else is told.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from macaron_ops.native.cuda import library

from . import gpu_tests
from .steps import CHECKOUT

FILE_NAME = "sanitizer.json"
# A graph's capture needs torch's cache of memory, and a million particles would take minutes.
_NEVER = "not cuda_graph and not million"
TOOLS = {"memcheck": ("-k", _NEVER), "racecheck": ("-k", f"{_NEVER} and not wide")}
CLEAN, SKIPPED, FOUND, FAILED, SLOW = "clean", "skipped", "found", "failed", "slow"
_GOOD = (CLEAN, SKIPPED)
SECONDS = 300.0  # of a piece
_MOST = 24  # tests in a piece
_SUMMARY = re.compile(r"^========= (?:ERROR|RACECHECK) SUMMARY: (\d+)", re.MULTILINE)
# A finding's first line; those that go on are further to the right.
_HEAD = re.compile(r"^========= (?!COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY)(\S.*)$", re.MULTILINE)
_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


def command() -> str | None:
    """Where compute-sanitizer is."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(_PLACES))


def why_not() -> str | None:
    """Why there is nothing to look at, or nothing to look with."""
    if command() is None:
        return "compute-sanitizer, of the CUDA toolkit, is not there"
    return library.why_not_loaded()


def pieces(arguments: Sequence[str]) -> list[list[str]]:
    """The tests that pytest collects, those of a function together, at most ``_MOST`` of them."""
    asked = [*_pytest(), "--collect-only", *arguments]
    listed = subprocess.run(asked, cwd=CHECKOUT, capture_output=True, text=True)
    tests = [line for line in listed.stdout.splitlines() if "::" in line and not line.startswith(("ERROR", "FAILED"))]
    if listed.returncode or not tests:
        raise RuntimeError(f"no tests were collected: {(listed.stdout + listed.stderr).strip()[-300:]}")
    functions = [list(some) for _, some in groupby(tests, lambda test: test.split("[")[0])]
    return [some[i : i + _MOST] for some in functions for i in range(0, len(some), _MOST)]


def run(
    folder: Path, tool: str, arguments: Sequence[str] = ("-m", "gpu", "tests/cuda"), seconds: float = SECONDS
) -> dict:
    """Looks at what was not looked at yet, and writes after each piece what came of it."""
    path = folder / FILE_NAME
    found = json.loads(path.read_text()) if path.exists() else {"tool": tool, "pieces": {}}
    wanted = {_name(tests): tests for tests in pieces([*arguments, *TOOLS[tool]])}
    for i, (name, tests) in enumerate(wanted.items()):
        if name not in found["pieces"]:
            found["left"] = len(wanted) - i
            _replace(path, found)
            found["pieces"][name] = _piece(tool, tests, folder / f"{i + 1}.log", seconds)
            print(f"[{i + 1}/{len(wanted)}] {name}: {_told(found['pieces'][name])}", flush=True)
    found["left"] = 0
    _replace(path, found)
    return found


def _piece(tool: str, tests: Sequence[str], log: Path, seconds: float) -> dict[str, object]:
    report = log.with_suffix(".xml")
    for path in (log, report):
        path.unlink(missing_ok=True)
    own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    asked = [command(), "--tool", tool, "--target-processes", "application-only", "--log-file", str(log)]
    asked += ["--report-api-errors", "no"] if tool == "memcheck" else []
    with subprocess.Popen(
        [*asked, *_pytest(), f"--junitxml={report}", *tests], cwd=CHECKOUT, env=os.environ | own, start_new_session=True
    ) as process:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return {"status": SLOW, "why": f"stopped after {seconds:.0f} s"}
        finally:
            _end(process)
    passed = gpu_tests.count([report])["passed"] if report.exists() else 0
    return read(log.read_text(errors="replace") if log.exists() else "", code, passed)


def read(log: str, code: int, passed: int) -> dict[str, object]:
    """What came of a piece whose process ended with ``code``, from the tool's log and how many tests passed."""
    summaries = [int(count) for count in _SUMMARY.findall(log)]
    heads = list(dict.fromkeys(_HEAD.findall(log)))[:5]
    if sum(summaries):
        return {"status": FOUND, "errors": sum(summaries), "why": "; ".join(heads)}
    if not summaries:
        return {"status": FAILED, "why": f"the tool left no summary and ended with {code}: {'; '.join(heads)}"}
    if code:
        return {"status": FAILED, "why": f"nothing was found, but pytest ended with {code}"}
    return {"status": CLEAN if passed else SKIPPED}


def told(found: dict) -> str:
    """A line for the summary."""
    states = [piece["status"] for piece in found["pieces"].values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in (*_GOOD, FOUND, FAILED, SLOW) if state in states)
    bad = [f"\n- {name}: {_told(piece)}" for name, piece in found["pieces"].items() if piece["status"] not in _GOOD]
    left = f", {found['left']} left" if found["left"] else ""
    return f"{found['tool']}, of {len(states)} pieces of tests/cuda: {counts or 'nothing yet'}{left}{''.join(bad)}"


def _told(piece: dict) -> str:
    return f"{piece['status']}{': ' * ('why' in piece)}{piece.get('why', '')}"


def _name(tests: Sequence[str]) -> str:
    return tests[0] if len(tests) == 1 else f"{tests[0]} and {len(tests) - 1} more"


def _pytest() -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]


def _end(process: subprocess.Popen) -> None:
    """With what it started: the tool watches a process of its own."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        pass


def _replace(path: Path, found: dict) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(partial, path)


def main(tool: str, folder: str, *arguments: str) -> int:
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 2
    try:
        found = run(Path(folder), tool, *((arguments,) if arguments else ()))
    except KeyboardInterrupt:
        return 130
    print(told(found))
    return int(any(piece["status"] not in _GOOD for piece in found["pieces"].values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
