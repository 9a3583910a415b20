"""Claim: compute-sanitizer's findings are read from its own summary; a piece of the tests that is not clean by it,
fails, ends without a summary or takes too long is told as such; what a call has looked at the next one passes over. By
a tool that is a script: without a GPU."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from macaron_ops.bench.gpu_suite import sanitizer, steps, summary
from macaron_ops.bench.gpu_suite.record import Record

CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
WRITES = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at norm_forward(NormRows, int)+0x1a0
=========     by thread (3,0,0) in block (0,0,0)
========= Invalid __global__ write of size 4 bytes
=========     at norm_forward(NormRows, int)+0x1a0
========= ERROR SUMMARY: 2 errors
"""
NO_RACE = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at sphere_keys+0x10
=========     and Read access at sphere_keys+0x90 [16 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.mark.parametrize(
    ("log", "code", "status", "why"),
    [
        (CLEAN, 0, "clean", None),
        (NO_RACE, 0, "clean", None),
        (WRITES, 0, "found", "Invalid __global__ write of size 4 bytes"),
        (RACE, 0, "found", "Error: Race reported between Write access at sphere_keys+0x10"),
        (CLEAN, 1, "failed", "nothing was found, but pytest ended with 1"),
        ("", 1, "failed", "the tool left no summary and ended with 1"),
        ("========= Error: No attachable process found\n", 1, "failed", "No attachable process"),
    ],
)
def test_what_the_tool_writes_is_read(log, code, status, why):
    found = sanitizer.read(log, code, passed=3)
    assert found["status"] == status and (why is None or why in found["why"])
    assert found.get("errors") == {WRITES: 2, RACE: 1}.get(log)


# Like the tool: takes its options, runs the rest, and leaves a summary in --log-file. What it is asked it notes.
TOOL = """#!{python}
import os, pathlib, subprocess, sys, time
log = pathlib.Path(sys.argv[sys.argv.index("--log-file") + 1])
tests = [argument for argument in sys.argv if "::" in argument]
with open({seen!r}, "a") as seen:
    print(sys.argv[2], os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"), *tests, file=seen)
if any("slow" in test for test in tests):
    time.sleep(60)
errors = int(any("wrong" in test for test in tests))
log.write_text("========= An error of its own\\n" * errors + f"========= ERROR SUMMARY: {{errors}} errors\\n")
sys.exit(subprocess.run(sys.argv[sys.argv.index({python!r}):]).returncode)
"""
# And like pytest: a test fails or is skipped where its name says so.
REPORT = """
import sys
(report,) = (argument.split("=")[1] for argument in sys.argv if argument.startswith("--junitxml="))
skipped = "<skipped/>" * any("skips" in test for test in sys.argv)
open(report, "w").write(f"<testsuite><testcase name='one'>{skipped}</testcase></testsuite>")
sys.exit(any("fails" in test for test in sys.argv))
"""
PYTEST = [sys.executable, "-c", REPORT]
TESTS = [["a.py::good[0]", "a.py::good[1]"], ["a.py::wrong"], ["a.py::fails"], ["a.py::slow"], ["a.py::skips"]]


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """The script is compute-sanitizer: what it was asked, a line a piece."""
    seen, script = tmp_path / "seen", tmp_path / "compute-sanitizer"
    script.write_text(TOOL.format(python=sys.executable, seen=str(seen)))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sanitizer, "_pytest", lambda: PYTEST)
    monkeypatch.setattr(sanitizer, "pieces", lambda arguments: TESTS)
    return lambda: seen.read_text().splitlines() if seen.exists() else []


def states(found):
    return {name: piece["status"] for name, piece in found["pieces"].items()}


def test_every_piece_is_looked_at_once_and_none_stops_the_next(tool, tmp_path):
    found = sanitizer.run(tmp_path, "racecheck", seconds=1.5)
    assert states(found) == {
        "a.py::good[0] and 1 more": "clean",
        "a.py::wrong": "found",
        "a.py::fails": "failed",
        "a.py::slow": "slow",
        "a.py::skips": "skipped",
    }
    assert [line.split()[2:] for line in tool()] == TESTS
    told = sanitizer.told(found)
    assert "racecheck, of 5 pieces of tests/cuda: 1 clean, 1 skipped, 1 found, 1 failed, 1 slow\n" in told
    assert "a.py::skips" not in told
    assert "a.py::wrong: found: An error of its own" in told and "slow: stopped after 2 s" in told
    assert sanitizer.run(tmp_path, "racecheck") == found and len(tool()) == 5


def test_memcheck_gives_each_tensor_an_allocation_of_its_own(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(sanitizer, "pieces", lambda arguments: TESTS[:1])
    for name, cached in (("memcheck", "1"), ("racecheck", "None")):
        folder = tmp_path / name
        folder.mkdir()
        sanitizer.run(folder, name)
        assert tool()[-1].split()[:2] == [name, cached]


def test_interrupted_it_keeps_what_it_has_and_goes_on_later(tool, tmp_path):
    """As the suite does where its time is up."""
    script = f"""
import sys
from macaron_ops.bench.gpu_suite import sanitizer
sanitizer.why_not, sanitizer._pytest, sanitizer.pieces = lambda: None, lambda: {PYTEST!r}, lambda arguments: {TESTS!r}
sys.exit(sanitizer.main("memcheck", {str(tmp_path)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=steps.CHECKOUT, start_new_session=True)
    while len(tool()) < 4 and process.poll() is None:  # it waits for the slow one
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) == 130
    kept = json.loads((tmp_path / sanitizer.FILE_NAME).read_text())
    assert list(states(kept).values()) == ["clean", "found", "failed"] and kept["left"] == 2
    assert "1 clean, 1 found, 1 failed, 2 left" in sanitizer.told(kept)
    found = sanitizer.run(tmp_path, "memcheck", seconds=1.0)
    assert len(tool()) == 6 and list(states(found).values()) == ["clean", "found", "failed", "slow", "skipped"]


def test_the_exit_code_is_that_of_a_failure_unless_all_is_clean(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(sanitizer, "why_not", lambda: None)
    for chosen, code in (([TESTS[0], TESTS[4]], 0), (TESTS[:2], 1)):
        monkeypatch.setattr(sanitizer, "pieces", lambda arguments, chosen=chosen: chosen)
        assert sanitizer.main("memcheck", str(tmp_path)) == code


def test_the_summary_tells_it(tmp_path):
    folder = tmp_path / "steps" / "memcheck"
    folder.mkdir(parents=True)
    found = {"tool": "memcheck", "left": 2, "pieces": {"tests/cuda/test_a.py::test_b": {"status": "clean"}}}
    (folder / sanitizer.FILE_NAME).write_text(json.dumps(found))
    assert summary._sanitizers(tmp_path, [Record("memcheck", "cut")]) == [
        "memcheck, of 1 pieces of tests/cuda: 1 clean, 2 left"
    ]


def test_each_hand_written_kernel_has_tests_to_look_at():
    """Which are marked gpu: collected here too."""
    found = sanitizer.pieces(["-m", "gpu", "tests/cuda", *sanitizer.TOOLS["racecheck"]])
    files = {piece[0].split("::")[0].rsplit("/", 1)[-1] for piece in found}
    assert files == {"test_norm_rows.py", "test_numbers.py", "test_ffn_step.py"}
    every = [test for piece in found for test in piece]
    assert all("cuda" in test.split("[")[1] for test in every) and not any("million" in test for test in every)
    wide = sanitizer.pieces(["-m", "gpu", "tests/cuda", *sanitizer.TOOLS["memcheck"]])
    assert any("test_wide_ffn.py" in piece[0] for piece in wide)


def test_without_the_tool_the_steps_are_left_out(monkeypatch):
    monkeypatch.setattr(sanitizer, "command", lambda: None)
    for name in sanitizer.TOOLS:
        (step,) = (step for step in steps.STEPS if step.name == name)
        assert "compute-sanitizer, of the CUDA toolkit, is not there" in step.why_not()
    monkeypatch.setattr(sanitizer, "command", lambda: "/bin/true")
    assert sanitizer.why_not() == sanitizer.library.why_not_loaded()
