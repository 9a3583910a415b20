"""Claim: under a tensor-parallel plan two processes, each with half of the hidden units and heads, compute the step:
outputs and all gradients of every option, whole, an optimiser's steps, and a ``state_dict`` that goes both ways; FSDP2
over another dimension of the mesh goes with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from macaron_ops.nn import FFNStep, SplitLayer
from macaron_ops.nn.tensor_parallel import tensor_parallel_plan
from tests.nn.tensor_parallel_worker import tests as cases_of

ROOT = Path(__file__).parents[2]


def run(world: int, folder: Path) -> dict[str, str]:
    """What the processes say of each case."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/nn/tensor_parallel_worker.py")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=900)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != "rendezvous"}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    """Of two processes, which run once."""
    return run(2, tmp_path_factory.mktemp("tensor_parallel"))


@pytest.mark.parametrize("name", cases_of(None))
def test_two_processes_compute_the_step(results, name):
    for rank in range(2):
        assert results[f"{name} {rank}"] == "passed", results[f"{name} {rank}"]


def test_four_processes_shard_the_shares_once_more(tmp_path):
    for case, said in run(4, tmp_path).items():
        assert said == "passed", f"{case}: {said}"


def test_models_without_steps_of_their_own_are_refused():
    with pytest.raises(ValueError, match="module: expected one with an FFNStep or AttendStep; got Linear"):
        tensor_parallel_plan(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got the SplitLayer '0', which is one node"):
        tensor_parallel_plan(nn.Sequential(SplitLayer(8, 2, 8)))
    assert list(tensor_parallel_plan(nn.ModuleDict({"a": FFNStep(4, 4)}))) == ["a"]
