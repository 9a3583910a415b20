"""The command refuses what cannot work before it starts, and leaves finished rows behind when it is interrupted."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

from macaron_ops import cli, doctor
from macaron_ops.bench import results, runner

TEACHING = ("tune", "inspect-kernels", "gpu-suite")
TINY_LAYERS = [
    "bench",
    "layers",
    "--quick",
    "--no-compile",
    "--device",
    "cpu",
    "--filter",
    "conformer-s/float32/forward/eager",
]


def refused(capsys, *arguments):
    assert cli.main(arguments) == cli.USAGE
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["", "bench", "bench layers", "bench all", "profile", "doctor", "gpu-suite", *TEACHING]
)
def test_every_command_has_help(command, capsys):
    """Whose examples are commands."""
    with pytest.raises(SystemExit) as exit_code:
        cli.main([*command.split(), "--help"])
    assert exit_code.value.code == 0
    said = capsys.readouterr().out
    assert "usage: macaron-ops" in said
    examples = re.findall(r"^ +macaron-ops (.+?)(?:  | && |$)", said, re.MULTILINE)
    assert len(examples) >= (4 if command in TEACHING else 0)
    for example in (each for each in examples if "--help" not in each):
        assert cli.parser().parse_args(shlex.split(example)).run


def test_an_unwritable_out_is_refused_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "run", lambda *arguments: pytest.fail("it ran"))
    file = tmp_path / "file"
    file.write_text("")
    assert f"--out {file / 'results'}: cannot be written" in refused(
        capsys, *TINY_LAYERS, "--out", str(file / "results")
    )


def test_the_results_of_another_run_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{}")
    assert "already holds a results.json" in refused(capsys, *TINY_LAYERS, "--out", str(tmp_path))


def test_an_unknown_filter_lists_the_choices(capsys):
    message = refused(capsys, "bench", "layers", "--quick", "--filter", "nonsense")
    assert "--filter nonsense matches nothing" in message
    assert "conformer-s" in message and "forward+backward" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["bench", "layers", "--dtype", "float8"],
            "--dtype 'float8': expected one of float32, bfloat16, float16, float64",
        ),
        (["bench", "layers", "--device", "abacus"], "--device: "),
        (["bench", "layers", "--device", "meta"], "--device meta: expected auto, cpu or cuda"),
        (["bench", "layers", "--device", "cuda:99"], "--device cuda:99: torch"),
        (["bench", "layers", "--compare", "nowhere.json"], "nowhere.json: No such file"),
        (["bench", "report", "nowhere.json"], "nowhere.json: No such file"),
        (["bench", "ops", "--backend", "magic"], "--backend 'magic': expected one of auto, cuda, triton, native"),
        (["profile", "--preset", "gpt"], "--preset 'gpt': expected one of iwslt"),
        (["profile", "--impl", "magic"], "--impl 'magic': expected one of eager Lie-Trotter"),
    ],
)
def test_what_cannot_be_is_said_without_a_traceback(arguments, message, capsys):
    assert message in refused(capsys, *arguments)


@pytest.mark.parametrize("arguments", [["--quick", "--full"], ["--threads", "0"], ["--threads", "two"]])
def test_contradictions_are_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as exit_code:
        cli.main(["bench", "layers", *arguments])
    assert exit_code.value.code == cli.USAGE


def test_missing_extras_name_the_install_command(monkeypatch, capsys):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    assert "pip install 'macaron_ops[bench]'" in refused(capsys, "bench", "model")


def test_layers_and_operators_need_torch_alone(tmp_path, capsys, tiny_budget, monkeypatch):
    for name in ("rich", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, "macaron_ops.bench.console", raising=False)
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    assert cli.main([*TINY_LAYERS, "--out", str(tmp_path)]) == cli.FINISHED
    output = capsys.readouterr().out
    assert "layers: conformer-s, float32, forward  (batch 2" in output and "[1/1] layers conformer-s" in output
    assert "there are no pictures" in (tmp_path / "report.html").read_text()


def test_a_run_goes_on_where_it_stopped_and_only_if_nothing_changed(tmp_path, capsys, tiny_budget, monkeypatch):
    monkeypatch.setattr("macaron_ops.bench.report.can_draw", lambda: False)  # pictures take seconds
    assert cli.main([*TINY_LAYERS, "--out", str(tmp_path)]) == cli.FINISHED
    whole = results.load(tmp_path)
    capsys.readouterr()
    part = whole | {"status": "interrupted", "rows": []}
    (tmp_path / "results.json").write_text(json.dumps(part))
    assert cli.main([*TINY_LAYERS, "--out", str(tmp_path), "--resume"]) == cli.FINISHED
    assert "layers conformer-s" in capsys.readouterr().out
    assert len(results.load(tmp_path)["rows"]) == len(whole["rows"])
    times = [row["time"] for row in results.load(tmp_path)["rows"]]
    assert cli.main([*TINY_LAYERS, "--out", str(tmp_path), "--resume"]) == cli.FINISHED
    assert [row["time"] for row in results.load(tmp_path)["rows"]] == times  # shares are of the better ceilings
    assert "it had other options" in refused(capsys, *TINY_LAYERS, "--seed", "1", "--out", str(tmp_path), "--resume")
    hung = part | {"status": "running", "measuring": "layers conformer-s float32 forward"}
    (tmp_path / "results.json").write_text(json.dumps(hung))
    assert cli.main([*TINY_LAYERS, "--out", str(tmp_path), "--resume"]) == cli.FAILED
    assert all("crashed or hung in it" in row["reason"] for row in results.load(tmp_path)["rows"])
    part["environment"]["sources"] = "others"
    (tmp_path / "results.json").write_text(json.dumps(part))
    assert "sources was others, is" in refused(capsys, *TINY_LAYERS, "--out", str(tmp_path), "--resume")


def test_a_run_ends_with_its_report_and_can_be_compared(tmp_path, capsys, tiny_budget):
    assert cli.main([*TINY_LAYERS, "--out", str(tmp_path / "first")]) == cli.FINISHED
    output = capsys.readouterr().out
    assert f"Report: {tmp_path / 'first' / 'report.html'}" in output
    assert "eager Strang is" in output
    document = results.load(tmp_path / "first")
    assert document["status"] == "complete"
    assert "ops bench layers --quick" in document["command"]
    for row in document["rows"]:  # an older run that was a thousand times faster
        row["time"] = {
            name: value / 1000 if name in ("median", "p20", "p80") else value for name, value in row["time"].items()
        }
    (tmp_path / "old.json").write_text(json.dumps(document))
    code = cli.main([*TINY_LAYERS, "--out", str(tmp_path / "second"), "--compare", str(tmp_path / "old.json")])
    assert code == cli.REGRESSED
    assert "regression: layers conformer-s float32 forward eager Strang" in capsys.readouterr().out
    assert "Against the older run" in (tmp_path / "second" / "report.html").read_text()


@pytest.fixture
def tiny_budget(monkeypatch):
    from macaron_ops.bench import ceilings
    from macaron_ops.bench.options import Options
    from macaron_ops.bench.timing import Budget

    monkeypatch.setattr(Options, "budget", Budget(seconds=0.01, min_rounds=2, sample_seconds=1e-4))
    monkeypatch.setattr(ceilings, "_GEMM_SIZES", {"cpu": (64,)})
    monkeypatch.setattr(ceilings, "_COPY_BYTES", {"cpu": 4096})


def test_ctrl_c_leaves_the_finished_rows_and_says_where(tmp_path):
    """A real process, a real SIGINT."""
    arguments = [
        "bench",
        "layers",
        "--quick",
        "--no-compile",
        "--device",
        "cpu",
        "--filter",
        "eager",
        "--out",
        str(tmp_path / "out"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "macaron_ops", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    file = tmp_path / "out" / "results.json"
    deadline = time.monotonic() + 120
    while not (file.exists() and len(results.load(file)["rows"])):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no group finished"
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED, errors
    document = results.load(file)
    assert document["status"] == "interrupted"
    assert document["rows"]
    assert f"{len(document['rows'])} finished measurements are in {file}" in errors


def test_doctor_tells_every_backend_and_operator_without_an_extra(monkeypatch):
    for name in ("rich", "matplotlib", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    text = doctor.report()
    for word in (
        "reference",
        "native",
        "triton",
        "cuda",
        "ffn_step",
        "sphere_attend_step",
        torch.__version__,
        "Extras",
    ):
        assert word in text
