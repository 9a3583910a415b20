"""Claim: under a tensor-parallel plan two processes, each with half of the hidden units and heads, compute the step:
outputs and all gradients of every option, whole, an optimiser's steps, and a ``state_dict`` that goes both ways; FSDP2
over another dimension of the mesh goes with it."""

import pytest
import torch.distributed as dist
from torch import nn

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from macaron_ops.nn import FFNStep, SplitLayer
from macaron_ops.nn.tensor_parallel import tensor_parallel_plan
from tests.nn.tensor_parallel_worker import tests as cases_of
from tests.processes import run_processes

WORKER = "tests/nn/tensor_parallel_worker.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    """Of two processes, which run once."""
    return run_processes(WORKER, 2, tmp_path_factory.mktemp("tensor_parallel"))


@pytest.mark.parametrize("name", cases_of(None))
def test_two_processes_compute_the_step(results, name):
    for rank in range(2):
        assert results[f"{name} {rank}"] == "passed", results[f"{name} {rank}"]


def test_four_processes_shard_the_shares_once_more(tmp_path):
    for case, said in run_processes(WORKER, 4, tmp_path).items():
        assert said == "passed", f"{case}: {said}"


def test_models_without_steps_of_their_own_are_refused():
    with pytest.raises(ValueError, match="module: expected one with an FFNStep or AttendStep; got Linear"):
        tensor_parallel_plan(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got the SplitLayer '0', which is one node"):
        tensor_parallel_plan(nn.Sequential(SplitLayer(8, 2, 8)))
    assert list(tensor_parallel_plan(nn.ModuleDict({"a": FFNStep(4, 4)}))) == ["a"]
