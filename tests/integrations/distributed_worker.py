"""One of two processes on the CPU that train the same models with torch.distributed's parts; see test_distributed.py.

usage: distributed_worker.py RANK 2 FOLDER
"""

import copy
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import macaron_ops
from macaron_ops.nn import SplitLayer
from tests.integrations.tiny_models import MODELS, tiny

WORLD = 2


def models() -> dict[str, nn.Module]:
    """Replaced models of torch and transformers, and layers that were built fused."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    found = {"torch": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)}
    found["built"] = nn.Sequential(SplitLayer(16, 2, 32, scheme="strang_BAB"), SplitLayer(16, 2, 32, save="lean"))
    for name in ("roberta", "llama", "parakeet"):
        found[name] = tiny(name)
    for name, model in found.items():
        if name != "built":
            macaron_ops.replace_layers(model, strict=True)
    return found


def batch(name: str, rank: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(100 + rank)
    if name == "torch":
        return {"src": torch.randn(2, 5, 16)}
    return {"input": torch.randn(2, 5, 16)} if name == "built" else MODELS[name].inputs()


def loss(model: nn.Module, inputs: dict) -> torch.Tensor:
    y = model(**inputs)
    y = y if isinstance(y, torch.Tensor) else y[0]
    return (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).mean()


def alone(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The gradients of the mean of both processes' losses, in one process."""
    model = copy.deepcopy(model)
    (sum(loss(model, batch(name, rank)) for rank in range(WORLD)) / WORLD).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            found[name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")] = grad
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def layers_of(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Where the fused layers are: parent, name, layer."""
    found = []
    for parent in model.modules():
        for name, child in parent.named_children():
            if hasattr(child, "replaced_class") or isinstance(child, SplitLayer):
                found.append((parent, name, child))
    return found


def ddp(model, name, rank, mesh):
    model = DistributedDataParallel(model, find_unused_parameters=True)  # RoBERTa's pooler is not in the loss
    loss(model, batch(name, rank)).backward()
    return model


def fsdp(model, name, rank, mesh, wrap=lambda layer: layer):
    for parent, child, layer in layers_of(model):
        setattr(parent, child, fully_shard(wrap(layer), mesh=mesh))
    fully_shard(model, mesh=mesh)
    loss(model, batch(name, rank)).backward()
    return model


def fsdp_and_checkpointing(model, name, rank, mesh):
    return fsdp(model, name, rank, mesh, checkpoint_wrapper)


WAYS = {"ddp": ddp, "fsdp": fsdp, "fsdp and checkpointing": fsdp_and_checkpointing}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    for way, function in WAYS.items():
        for name, model in models().items():
            if name == "parakeet" and way != "ddp":
                continue  # its BatchNorm's statistics are a process's own
            result = folder / f"{way} {name} {rank}"
            try:
                model.eval() if name == "parakeet" else model.train()
                expected = alone(model, name)
                compare(function(copy.deepcopy(model), name, rank, mesh), expected)
                result.write_text("passed")
            except Exception:
                result.write_text(traceback.format_exc())
            dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[3]))
