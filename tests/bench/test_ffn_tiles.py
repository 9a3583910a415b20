"""Claim: every tile of the wide FFN's products is timed beside the bare product and none with wrong numbers, the
fastest comes first, and where there are no such products that is said. On the products that run on the CPU."""

import json
import subprocess
import sys

import pytest
import torch

from macaron_ops.bench import ffn_tiles, timing
from macaron_ops.native.cuda import library

CPU = torch.device("cpu")


@pytest.mark.skipif(not library.on_host() or library.why_not_loaded(), reason="needs the kernels for the CPU")
def test_every_tile_is_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ffn_tiles, "_BUDGET", timing.Budget(seconds=1e-6, min_rounds=3, sample_seconds=1e-6))
    document = ffn_tiles.run(tmp_path, CPU, [(70, 24, 40)])
    assert json.loads((tmp_path / ffn_tiles.FILE_NAME).read_text()) == document
    assert {"device", "versions", "commit"} <= document["environment"].keys()
    found = document["products"]
    assert [(f["product"], f["activation"]) for f in found] == [
        *((product, "relu") for product in ("hidden", "residual", "backward")),
        *((product, "gelu") for product in ("hidden", "backward")),
    ]
    for each in found:
        medians = [row["median"] for row in each["times"].values()]
        assert medians == sorted(medians) and len(medians) == 4 * 3 + 1
        assert each["chosen"] in each["times"] and each["times"][ffn_tiles.CUBLAS]["ratio"] == 1
    assert len(capsys.readouterr().out.splitlines()) == len(found)


def test_a_tile_with_wrong_numbers_is_not_timed():
    right = torch.ones(2, 8)

    def call(tile, turn):
        return (right + (tile == 2 and turn == 4), right)

    with pytest.raises(AssertionError, match="hidden, tile 2, turn 4: not the numbers of tile 0"):
        ffn_tiles.measured("hidden", call, lambda: right, CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without a GPU")
def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setenv("MACARON_OPS_CUDA_ON_HOST", "0")
    command = [sys.executable, "-m", "macaron_ops.bench.ffn_tiles"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("the products by CUTLASS do not run here: ")
