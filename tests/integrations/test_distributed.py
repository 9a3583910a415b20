"""Claim: fused layers, built or put into models, train under DDP, FSDP2 and activation checkpointing: two processes get
the gradients of one that sees both batches."""

import pytest
import torch.distributed as dist

from tests.processes import run_processes

pytest.importorskip("transformers")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

CASES = [
    (way, name) for way in ("ddp", "fsdp", "fsdp and checkpointing") for name in ("torch", "built", "roberta", "llama")
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    """What both processes say of each case; they run once."""
    return run_processes("tests/integrations/distributed_worker.py", 2, tmp_path_factory.mktemp("distributed"))


@pytest.mark.parametrize(("way", "name"), [*CASES, ("ddp", "parakeet")])
def test_two_processes_get_the_gradients_of_one(results, way, name):
    for rank in range(2):
        assert results[f"{way} {name} {rank}"] == "passed", results[f"{way} {name} {rank}"]
