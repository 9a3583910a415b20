"""Claim: the steps run one after another and none stops the next; what is there is not done again unless it no longer
holds; with little time the rest waits for another call; the summary tells all of it. Without a GPU."""

import dataclasses
import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from macaron_ops import cli
from macaron_ops.bench import environment, goals, results, runner, suites
from macaron_ops.bench.gpu_suite import gpu_tests, record, run, steps, summary
from macaron_ops.bench.gpu_suite.steps import Step

CPU = torch.device("cpu")
COUNTS = "import pathlib, sys; pathlib.Path(sys.argv[1], 'ran').open('a').write('.')"


def step(name, code="", **fields):
    """A step that counts how often it ran, then runs `code`."""
    fields = {"seconds": 1, "least": 1, "limit": 30} | fields
    return Step(name, "a test", command=lambda folder: ["-c", f"{COUNTS}\n{code}", str(folder)], **fields)


def do(folder, *chosen, **options):
    return run.run(folder, chosen, CPU, say=lambda text: None, **options)


def statuses(records):
    return [(each.step, each.status) for each in records]


def times_run(folder, name):
    path = folder / "steps" / name / "ran"
    return len(path.read_text()) if path.exists() else 0


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(run, "_GRACE", 5.0)
    monkeypatch.setattr("macaron_ops.bench.report.can_draw", lambda: False)  # pictures take seconds


def test_one_that_fails_crashes_or_hangs_stops_no_other(tmp_path):
    found = do(
        tmp_path,
        step("wrong", "sys.exit(1)"),
        step("crash", "print('no such kernel'); sys.exit(7)"),
        step("hang", "import time; time.sleep(60)", limit=1),
        step("lacking", why_not=lambda: "pytest is not installed"),
        step("good"),
    )
    assert statuses(found) == [
        ("wrong", "failed"),
        ("crash", "crashed"),
        ("hang", "hung"),
        ("lacking", "left out"),
        ("good", "done"),
    ]
    assert "it ended with 7: no such kernel" in found[1].reason
    assert summary.exit_code(found) == 1
    assert [summary.exit_code(found[i : i + 1]) for i in range(5)] == [1, 1, 1, 0, 0]
    told = (tmp_path / "summary.md").read_text()
    assert "pytest is not installed" in told and "no such kernel" in told


def test_what_a_step_started_ends_with_it(tmp_path):
    started = """
import subprocess, time
pathlib.Path(sys.argv[1], 'pid').write_text(str(subprocess.Popen(['sleep', '60']).pid))
time.sleep(60)
"""
    (found,) = do(tmp_path, step("parent", started, limit=2))
    assert found.status == "hung"
    pid = (tmp_path / "steps" / "parent" / "pid").read_text()
    state = Path("/proc", pid, "stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_second_call_goes_on(tmp_path):
    first, second = step("first"), step("second", "sys.exit(7)")
    do(tmp_path, first, second)
    found = do(tmp_path, first, step("second", "sys.exit(7)"))
    assert statuses(found) == [("first", "done"), ("second", "crashed")]
    assert times_run(tmp_path, "first") == 1 and times_run(tmp_path, "second") > 1


@pytest.mark.parametrize("changed", ["code", "device", "command"])
def test_what_no_longer_holds_is_done_again(changed, tmp_path, monkeypatch):
    (before,) = do(tmp_path, step("one"))
    if changed == "code":
        monkeypatch.setattr(environment, "sources", lambda device: "other")
    elif changed == "device":
        monkeypatch.setattr(environment, "_cpu", lambda: {"name": "another"})
    (tmp_path / "steps" / "one" / "old").write_text("")
    said = []
    (found,) = run.run(tmp_path, [step("one", "1" if changed == "command" else "")], CPU, say=said.append)
    assert found.status == "done" and not (tmp_path / "steps" / "one" / "old").exists()
    assert any("no longer holds" in line for line in said)


def test_other_tests_are_run_again_and_nothing_else_is(tmp_path, monkeypatch):
    tests, other = step("tests", reads_tests=True), step("other")
    do(tmp_path, tests, other)
    (tmp_path / "steps" / "other" / "kept").write_text("")
    monkeypatch.setattr(record, "_tests", lambda: "changed")
    do(tmp_path, tests, other)
    assert (tmp_path / "steps" / "other" / "kept").exists()
    assert json.loads((tmp_path / "steps" / "tests" / "record.json").read_text())["environment"]["versions"]["tests"]


def test_building_the_cpu_kernels_makes_nothing_of_a_gpu_old(tmp_path, monkeypatch):
    from macaron_ops import native

    library = tmp_path / "library.so"
    cuda = torch.device("cuda")
    monkeypatch.setattr(native, "library", lambda: None)
    before = {device: environment.sources(device) for device in (CPU, cuda)}
    library.write_text("built")
    monkeypatch.setattr(native, "library", lambda: library)
    assert environment.sources(cuda) == before[cuda] and environment.sources(CPU) != before[CPU]


def test_what_other_cuda_kernels_did_is_old(tmp_path, monkeypatch):
    """Also what a sanitizer found in them."""
    from macaron_ops.native.cuda import library

    cuda, file = torch.device("cuda"), tmp_path / "library.so"
    monkeypatch.setattr(library, "path", lambda: file)
    found = []
    for why_not, content in (("not built", b"one"), (None, b"one"), (None, b"another")):
        monkeypatch.setattr(library, "why_not_loaded", lambda why_not=why_not: why_not)
        file.write_bytes(content)
        found.append([environment.sources(device) for device in (cuda, CPU)])
    assert len({of_gpu for of_gpu, _ in found}) == 3 and len({of_cpu for _, of_cpu in found}) == 1


def test_what_another_call_left_stays_in_the_summary_while_it_holds(tmp_path, monkeypatch, make_document, make_row):
    document = json.dumps(make_document(make_row()))
    first = step("first", f"pathlib.Path(sys.argv[1], 'results.json').write_text({document!r})")
    do(tmp_path, first)
    do(tmp_path, step("second"))
    told = json.loads((tmp_path / "summary.json").read_text())
    assert {each["step"] for each in told["steps"]} == {"first", "second"}
    assert len(results.load(tmp_path)["rows"]) == 1
    monkeypatch.setattr(environment, "sources", lambda device: "other")
    do(tmp_path, step("second"))
    told = json.loads((tmp_path / "summary.json").read_text())
    assert [each["step"] for each in told["steps"]] == ["second"] and told["to_commit"] is None
    assert not (tmp_path / "results.json").exists() and not (tmp_path / "report.html").exists()


def test_the_folder_can_move(tmp_path):
    do(tmp_path / "here", step("one"))
    (tmp_path / "here").rename(tmp_path / "there")
    do(tmp_path / "there", step("one"))
    assert times_run(tmp_path / "there", "one") == 1


class Clock:
    """Each question is a second later."""

    time = 0.0

    def __call__(self):
        self.time += 1.0
        return self.time


def test_with_little_time_steps_are_left_for_another_call(tmp_path):
    chosen = [step("short", least=5), step("long", least=500), step("last", least=5)]
    found = do(tmp_path, *chosen, minutes=1, clock=Clock())
    assert statuses(found) == [("short", "done"), ("long", "skipped"), ("last", "done")]
    assert "it needs 500 s at least" in found[1].reason and summary.exit_code(found) == 0
    found = do(tmp_path, *chosen)
    assert statuses(found) == [("short", "done"), ("long", "done"), ("last", "done")]
    assert times_run(tmp_path, "short") == times_run(tmp_path, "long") == 1


def test_a_step_that_the_time_ends_is_asked_to_stop_and_goes_on_later(tmp_path):
    waits = """
import time
done = pathlib.Path(sys.argv[1], 'partial')
if not done.exists():
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        done.write_text('what there was')
        raise
"""
    (found,) = do(tmp_path, step("cut", waits), minutes=(run._LAST + 3) / 60)
    assert found.status == "cut" and summary.exit_code([found]) == 0
    assert (tmp_path / "steps" / "cut" / "partial").read_text() == "what there was"
    (found,) = do(tmp_path, step("cut", waits))
    assert found.status == "done" and times_run(tmp_path, "cut") == 2


def test_a_step_goes_on_past_what_lost_the_device_while_there_is_something_new(tmp_path, make_document, make_row):
    rows = [make_row(f"variant {i}") for i in range(3)]
    documents = [json.dumps(make_document(*rows[: i + 1])) for i in range(3)]
    loses = f"""
documents = {documents!r}
runs = len(pathlib.Path(sys.argv[1], 'ran').read_text())
pathlib.Path(sys.argv[1], 'results.json').write_text(documents[min(runs, 3) - 1])
sys.exit({cli.LOST} if runs < 3 or sys.argv[2:] else 0)
"""
    (found,) = do(tmp_path, step("lost", loses))
    assert found.status == "done" and times_run(tmp_path, "lost") == 3
    always = step("always", loses)
    always = dataclasses.replace(always, command=lambda folder: [*step("always", loses).command(folder), "always"])
    (found,) = do(tmp_path, always)
    assert found.status == "crashed" and times_run(tmp_path, "always") == 4


def test_an_interruption_leaves_a_record_and_a_summary(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_process", interrupted)
    with pytest.raises(KeyboardInterrupt):
        do(tmp_path, step("one"))
    assert record.load(tmp_path / "steps" / "one").status == "cut"
    assert (tmp_path / "summary.json").exists()


def test_measurements_of_all_steps_are_one_document(tmp_path, make_document, make_row):
    (ours, eager), where = ("macaron_ops triton", "eager"), {"dtype": "bfloat16", "tokens": 16384}
    fields = {"suite": "ops", "subject": "ffn_step conformer-s", "flops_per_s": 100.0} | where
    refused = {"replay_refused": "it cannot be captured"}
    documents = {
        "a": make_document(make_row(eager, 2.0, **fields), make_row(ours, 1.0, extra=refused, **fields)),
        "b": make_document(make_row(subject="bert-base"), status="interrupted"),
    }
    for name, rate in (("a", 400.0), ("b", 800.0)):
        documents[name]["ceilings"]["gemm"] = {dtype: {"flops_per_s": rate} for dtype in ("bfloat16", "float32")}
        folder = tmp_path / "steps" / name
        folder.mkdir(parents=True)
        folder.joinpath("results.json").write_text(json.dumps(documents[name]))
    found = do(tmp_path, step("a"), step("b"), step("empty"))
    whole = results.load(tmp_path)
    assert whole["status"] == "interrupted" and len(whole["rows"]) == 3
    assert whole["rows"][0]["share_of_gemm"] == 100 / 800  # of the best ceiling that any step saw
    told = summary.gather(tmp_path, found, environment.record(CPU), whole)
    assert any(line.startswith("met: ffn_step conformer") for line in told["goals"])
    assert told["to_commit"].startswith("bench/results/") and told["to_commit"].endswith(".json")
    text = (tmp_path / "summary.md").read_text()
    assert "it cannot be captured" in text
    (line,) = (line for line in text.splitlines() if "ffn_step conformer-s, forward, bfloat16: triton" in line)
    assert line.split()[-5:] == ["s", "2.00x", "-", "-", "12%"]  # of 2 s, of the best ceiling
    assert (tmp_path / "report.html").exists()


def ceilings_of_the_cpu():
    command = steps.bench("ceilings", "--dtype", "float32")
    return dataclasses.replace(
        step("ceilings", limit=300), command=lambda folder: ["cpu" if a == "cuda" else a for a in command(folder)]
    )


BARE = """
import pathlib, socket, sys

def refuse(*arguments, **options):
    raise OSError("there is no network")

socket.getaddrinfo = socket.socket.connect = refuse
sys.modules.update(dict.fromkeys(("rich", "matplotlib", "transformers", "hypothesis", "pytest", "scipy"), None))
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
pathlib.Path(__file__).with_suffix(".met").touch()
"""


def test_torch_and_numpy_without_a_network_are_enough(tmp_path, monkeypatch):
    """A step's process finds the checkout; what the extras or an installation would bring is not there."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = do(tmp_path / "out", ceilings_of_the_cpu())
    assert statuses(found) == [("ceilings", "done")], (tmp_path / "out" / "summary.md").read_text()
    assert (tmp_path / "sitecustomize.met").exists()
    assert results.load(tmp_path / "out")["ceilings"]["gemm"]["float32"]["flops_per_s"] > 0


def test_the_same_steps_on_the_cpu_from_end_to_end(tmp_path):
    """A measurement by the real command, and real tests in two processes."""
    goals = "tests/bench/test_goals.py"
    tests = dataclasses.replace(
        step("tests", limit=300),
        command=lambda folder: ["-m", "macaron_ops.bench.gpu_suite.gpu_tests", str(folder), "2", goals],
    )
    found = do(tmp_path, ceilings_of_the_cpu(), tests)
    assert statuses(found) == [("ceilings", "done"), ("tests", "done")], (tmp_path / "summary.md").read_text()
    assert results.load(tmp_path)["ceilings"]["gemm"]["float32"]["flops_per_s"] > 0
    counted = json.loads((tmp_path / "steps" / "tests" / "tests.json").read_text())
    passed = Path(steps.CHECKOUT, goals).read_text().count("\ndef test_")
    assert (counted["passed"], counted["failed"]) == (passed, 0)
    told = (tmp_path / "summary.md").read_text()
    assert f"{passed} passed, 0 failed" in told and "Ceilings: copy" in told


def test_tests_are_counted_and_a_missing_package_is_not_a_failure(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text("""<testsuites><testsuite>
        <testcase classname="tests.a" name="good"/>
        <testcase classname="tests.a" name="skips"><skipped message="no"/></testcase>
        <testcase classname="tests.a" name="bad"><failure message="off by 1&#10;and more">text</failure></testcase>
        <testcase classname="" name="tests.b"><error message="collection failure">
            E ModuleNotFoundError: No module named 'transformers'</error></testcase>
        <testcase classname="" name="tests.c"><error message="collection failure">E SyntaxError</error></testcase>
    </testsuite></testsuites>""")
    found = gpu_tests.count([report])
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    assert found["left_out"] == ["tests.b: transformers is not installed"]
    assert [each["test"] for each in found["failures"]] == ["tests.a::bad", "tests.c"]
    assert found["failures"][0]["why"] == "off by 1"


def test_a_test_process_without_a_report_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = gpu_tests.run(tmp_path, 2)
    assert found["failed"] == 2 and "ended with 1 and left no report" in found["failures"][0]["why"]


BREAKS = """
import pytest, torch
from tests import conftest

conftest.GPU, torch.cuda.synchronize = True, lambda: None

def broken():
    raise RuntimeError("an illegal memory access")

@pytest.mark.parametrize("i", range(6))
def test_one(i):
    if i == 1:
        torch.cuda.synchronize = broken
        broken()
"""


def test_what_a_broken_context_kept_from_running_runs_in_another_process(tmp_path):
    """And the test that broke it is done again by itself."""
    path = Path(steps.CHECKOUT, "tests", "bench", f"breaks_the_context_of_{os.getpid()}.py")
    path.write_text(BREAKS)
    try:
        found = gpu_tests.run(tmp_path, 1, (str(path),))
    finally:
        path.unlink()
    assert (found["passed"], found["failed"], found["skipped"], found["left"]) == (5, 2, 0, []), found
    assert any(
        "by itself too, the last kernel (launches-1.log): none of Triton's" in f["why"] for f in found["failures"]
    )
    assert (tmp_path / "tests-again-2-1.xml").exists() and not (tmp_path / "tests-again-3-1.xml").exists()


class Interrupted(subprocess.Popen):
    """Ctrl-C comes while it is waited for without an end."""

    def wait(self, timeout=None):
        if timeout is None and self.poll() is None and not self.killed:
            raise KeyboardInterrupt
        return super().wait(timeout)

    killed = False

    def kill(self):
        self.killed = True
        super().kill()


def test_interrupted_a_test_process_that_hangs_costs_no_other_its_results(tmp_path, monkeypatch):
    """One has reported, one hangs as by its kernel, one is killed while it writes."""
    monkeypatch.setattr(gpu_tests, "_GRACE", 0.2)
    done = '<testsuite><testcase classname="tests.a" name="good"/></testsuite>'
    left = [done, None, done[:-8]]
    started = []

    def start(index, report, processes, arguments):
        if left[index]:
            report.write_text(left[index])
        started.append(Interrupted([sys.executable, "-c", "import time; time.sleep(600)"]))
        return started[-1]

    monkeypatch.setattr(gpu_tests, "_start", start)
    found = gpu_tests.run(tmp_path, 3)
    assert json.loads((tmp_path / gpu_tests.FILE_NAME).read_text()) == found and found["interrupted"]
    assert (found["passed"], found["failed"]) == (1, 2)
    why = "it ended with -9 and left no report"
    assert found["failures"] == [{"test": f"process {i} of 3", "why": why} for i in (2, 3)]
    assert all(process.returncode is not None for process in started)


def test_the_steps_are_told_and_every_bench_step_is_a_command_that_exists(capsys):
    assert cli.main(["gpu-suite", "--list"]) == cli.FINISHED
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [step.name for step in steps.STEPS]
    late = ("memcheck", "racecheck", "native")
    assert sum(step.seconds for step in steps.STEPS if step.name not in late) <= 13 * 60
    assert [step.name for step in steps.STEPS[-len(late) :]] == list(late)
    for each in steps.STEPS:
        command = each.command(Path("folder"))
        if "bench" in command:
            assert cli.parser().parse_args(command[2:]).resume
    assert all(each.least <= each.seconds <= each.limit for each in steps.STEPS)


def bench_steps(monkeypatch):
    """(suite, options, every group, the jobs) of the steps that measure, as on a GPU."""
    monkeypatch.setattr(cli, "_device", lambda given: torch.device("cuda"))
    for each in steps.STEPS:
        command = each.command(Path("folder"))
        if command[2:3] == ["bench"] and command[3] != "ceilings":
            options = cli.bench_options(cli.parser().parse_args(command[2:]))
            groups = suites.groups([command[3]], options)
            yield command[3], options, groups, runner.select(groups, options)


def test_the_filters_of_the_steps_share_the_groups_of_ops_among_them(monkeypatch):
    """Every group of bfloat16 is in one step and in one alone."""
    every, taken = None, []
    for suite, options, groups, jobs in bench_steps(monkeypatch):
        if suite == "ops" and options.dtypes == ("bfloat16",):
            every = {group.name for group in groups}
            taken += [job.group.name for job in jobs]
    assert len(taken) == len(set(taken)) and set(taken) == every


def test_every_goal_on_a_gpu_is_measured_by_a_step(monkeypatch):
    """But for those of the CUDA library, which may not be here."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # pykeops
    jobs = [job for *_, found in bench_steps(monkeypatch) for job in found]

    def measured(goal, job):
        found = job.group
        words = (found.suite, found.subject, found.dtype, found.direction)
        fits = goal.shape.items() <= found.shape.items() and goal.tokens in (None, found.tokens)
        return fits and all(map(fnmatch, words, goal.where)) and {goal.variant, goal.over} - {None} <= {*job.names}

    for goal in goals._GPU_GOALS:
        if goal.variant != goals.CUDA:
            assert any(measured(goal, job) for job in jobs), goal


def test_without_a_gpu_and_with_wrong_arguments_it_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["gpu-suite", "--out", str(tmp_path / "out")]) == cli.USAGE
    assert "gpu-suite needs a GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert cli.main(["gpu-suite", "--list", "--only", "ceilings,magic"]) == cli.USAGE
    assert "--only 'magic': expected some of ceilings,ffn" in capsys.readouterr().err
    assert cli.main(["gpu-suite"]) == cli.USAGE
    with pytest.raises(SystemExit):
        cli.main(["gpu-suite", "--minutes", "0"])
