"""Claim: fused layers, built or put into models, train under DDP, FSDP2 and activation checkpointing: two processes get
the gradients of one that sees both batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("transformers")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

ROOT = Path(__file__).parents[2]
CASES = [
    (way, name) for way in ("ddp", "fsdp", "fsdp and checkpointing") for name in ("torch", "built", "roberta", "llama")
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    """What both processes say of each case; they run once."""
    folder = tmp_path_factory.mktemp("distributed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/integrations/distributed_worker.py")]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=900)[1] for process in processes]
    found = {path.name: path.read_text() for path in folder.iterdir() if path.name != "rendezvous"}
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return found


@pytest.mark.parametrize(("way", "name"), [*CASES, ("ddp", "parakeet")])
def test_two_processes_get_the_gradients_of_one(results, way, name):
    for rank in range(2):
        assert results[f"{way} {name} {rank}"] == "passed", results[f"{way} {name} {rank}"]
