"""Rows and documents as a run makes them, and a preset that runs in a blink."""

from dataclasses import replace

import pytest

from macaron_ops.bench import presets, results, suites
from macaron_ops.bench.options import Options
from macaron_ops.bench.timing import Budget, Timing, speedup


@pytest.fixture
def make_row():
    """make_row("eager Strang", median=2.0, noise=0.1): a finished row of the layers suite unless told otherwise."""

    def make(variant="eager Lie-Trotter", median=1.0, noise=0.05, over=1.0, **fields):
        timing = Timing(tuple(median * (1 + noise * offset) for offset in (-1, -0.5, 0, 0.5, 1)), 1)
        denominator = Timing((over,) * 5, 1)
        row = {
            "suite": "layers",
            "subject": "wmt-base",
            "shape": {"batch": 2, "length": 3},
            "dtype": "float32",
            "pass": "forward",
            "variant": variant,
            "status": "ok",
            "reason": None,
            "seed": 0,
            "time": timing.as_json(),
            "tokens": 6,
            "tokens_per_s": 6 / median,
            "flops": 1000,
            "flops_per_s": 1000 / median,
            "share_of_gemm": 0.5,
            "memory": {"peak_bytes": 4096, "activation_bytes": 1024, "kept_bytes": None, "method": "test"},
            "speedup": {"over": "eager Lie-Trotter", **speedup(timing, denominator)},
            "check": None,
            "extra": {},
        }
        return row | fields

    return make


@pytest.fixture
def make_document():
    def make(*rows, **fields):
        return {
            "schema": results.SCHEMA,
            "status": "complete",
            "command": "macaron-ops bench layers",
            "started": "2026-01-01T00:00:00+00:00",
            "seconds": 1.0,
            "options": {},
            "environment": {"device": {"name": "a machine"}, "device_type": "cpu", "versions": {"torch": "2.11"}},
            "ceilings": {"gemm": {"float32": {"flops_per_s": 2e3}}, "copy": {"bytes_per_s": 1e9}},
            "notes": [],
            "rows": list(rows),
        } | fields

    return make


@pytest.fixture
def tiny(monkeypatch):
    """Every suite runs the tiny preset alone, with hardly any time to look."""
    monkeypatch.setattr(Options, "budget", Budget(seconds=0.01, min_rounds=2, max_rounds=3, sample_seconds=1e-5))
    monkeypatch.setattr(suites.layers, "PRESETS", {"tiny": presets.TINY})
    monkeypatch.setattr(suites.ops, "PRESETS", {"tiny": presets.TINY})
    monkeypatch.setattr(suites.schemes, "PRESETS", {"tiny": presets.TINY})
    monkeypatch.setattr(suites.ngpt, "PRESETS", (replace(presets.TINY, activation="swiglu"),))
    monkeypatch.setattr(suites.schemes, "PRESET", "tiny")
    monkeypatch.setattr(suites.ops, "QUICK_PRESETS", ("tiny",))
    monkeypatch.setattr(suites.ops, "NORMAL_PRESETS", ("tiny",))
    monkeypatch.setattr(suites.ops, "_PARTICLES", {"cpu": {effort: (2, 5, 4) for effort in presets.EFFORTS}})
    monkeypatch.setattr(suites.ops, "_IN_SPACE", {"cpu": {effort: 7 for effort in presets.EFFORTS}})
    monkeypatch.setattr(suites.ops, "_CHECKED", 9)
    monkeypatch.setattr("macaron_ops.bench.ceilings._GEMM_SIZES", {"cpu": (16,)})
    monkeypatch.setattr("macaron_ops.bench.ceilings._COPY_BYTES", {"cpu": 4096})
    monkeypatch.setattr("macaron_ops.bench.ceilings._BUDGET", {"cpu": Budget(0.001, 2, 2, 1e-5)})
