"""One of the processes on the CPU that hold the shares of the same steps; see test_tensor_parallel.py.

usage: tensor_parallel_worker.py RANK WORLD FOLDER
"""

import copy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import parallelize_module

from macaron_ops.nn import AttendStep, FFNStep
from macaron_ops.nn.tensor_parallel import ShardedStep, shaped_like, tensor_parallel_plan
from tests import twins
from tests.nn.tools import randomize
from tests.rule import assert_draws_by_rule

WORLD = 2
D, H, F, B, T = 8, 4, 12, 2, 5

STEPS = {
    "ffn": (FFNStep, {}),
    "ffn gated": (FFNStep, {"activation": "swiglu", "norm": "rms", "residual_scale": 1.5}),
    "ffn without biases": (FFNStep, {"activation": "geglu", "bias": False}),
    "ffn post": (FFNStep, {"placement": "post", "activation": "gelu"}),
    "ffn sphere post": (FFNStep, {"placement": "post", "norm": "sphere"}),
    "ffn dropout": (FFNStep, {"dropout": 0.4}),
    "ffn post dropout": (FFNStep, {"dropout": 0.4, "placement": "post"}),
    "attend": (AttendStep, {}),
    "attend post": (AttendStep, {"placement": "post", "norm": "rms"}),
    "attend grouped": (AttendStep, {"num_kv_heads": 2, "head_dim": 3}),
    "attend grouped without biases": (AttendStep, {"num_kv_heads": 2, "bias": False}),
    "attend dropout": (AttendStep, {"dropout": 0.4, "residual_scale": 0.5}),
    "attend to another width": (AttendStep, {"context_dim": 6}),
    "attend lean": (AttendStep, {"save": "lean", "norm": None}),
}


def calls(name: str) -> dict[str, dict[str, object]]:
    """What a step is called with beside x, by a name."""
    if name.startswith("ffn"):
        return {"": {"seed": 7} if "dropout" in name else {}}
    if name == "attend to another width":
        return {"context": {"context": leaf(B, 3, 6)}}
    if name == "attend dropout":
        return {"seed": {"seed": 7}}
    padding = torch.arange(T) >= torch.tensor([[T], [3]])
    angles = torch.randn(T, 1).double()
    return {
        "causal": {"causal": True, "rotary": (angles.cos(), angles.sin())},
        "padded": {"key_padding_mask": padding},
        "mask of each head": {"attn_mask": leaf(B * H, T, T)},
        "mask of each head in four dimensions": {"attn_mask": leaf(1, H, T, T)},
        "one mask": {"attn_mask": leaf(T, T)},
        "mask of each sequence": {"attn_mask": leaf(B, 1, T, T)},
        "context": {"context": leaf(B, 3, D)},
    }


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def build(name: str) -> nn.Module:
    cls, options = STEPS[name]
    return randomize(cls(D, F if cls is FFNStep else H, dtype=torch.float64, **options))


def shared_out(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(copy.deepcopy(module), mesh, tensor_parallel_plan(module))


def run(module: nn.Module, x: Tensor, arguments: dict[str, object]) -> dict[str, Tensor]:
    """The output and all gradients, whole."""
    leaves = {"x": x, **{n: a for n, a in arguments.items() if isinstance(a, Tensor) and a.requires_grad}}
    leaves |= dict(module.named_parameters())
    y = module(x, **arguments)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).bfloat16().to(y.dtype).view(y.shape)
    grads = torch.autograd.grad((y * weights).sum(), list(leaves.values()))
    found = {"y": y.detach()}
    for name, grad in zip(leaves, grads, strict=True):
        if hasattr(grad, "full_tensor"):
            assert not any(p.is_partial() for p in grad.placements), f"{name}: {grad.placements}"
            assert grad.placements == leaves[name].placements or grad.placements == (Replicate(),)
            grad = grad.full_tensor()
        found[name] = grad
    return found


def same_function(name: str, mesh: DeviceMesh) -> None:
    module = build(name)
    shares = shared_out(module, mesh)
    for call, arguments in calls(name).items():
        x = leaf(B, T, D)
        expected, found = run(module, x, arguments), run(shares, x, arguments)
        assert found.keys() == expected.keys()
        for key in expected:
            actual = found[key].view_as(expected[key])  # blocks of rows are a dimension of their own
            torch.testing.assert_close(actual, expected[key], msg=lambda text, k=key, c=call: f"{c} {k}: {text}")


def by_rule(name: str, dtype: torch.dtype, mesh: DeviceMesh) -> None:
    """The shares in a narrow dtype against the eager step in it."""
    module = build(name)
    for parameter in module.parameters():
        parameter.data.copy_(parameter.data.bfloat16())
    narrow = copy.deepcopy(module).to(dtype)
    eager = Eager(narrow)
    shares = shared_out(narrow, mesh)

    def draw(seed: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        torch.manual_seed(seed)
        x = torch.randn(B, T, D).bfloat16()
        found = [
            run(m, x.to(d).requires_grad_(), {}) for m, d in ((shares, dtype), (eager, dtype), (module, torch.float64))
        ]
        found[1] = {key.removeprefix("step."): value for key, value in found[1].items()}
        return {key: tuple(f[key].view_as(found[2][key]) for f in found) for key in found[2]}

    assert_draws_by_rule(draw)


class Eager(nn.Module):
    """The eager twin of a step with a LayerNorm, on its parameters."""

    def __init__(self, step: nn.Module):
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        found = self.step.substep()
        options = {k: v for k, v in found.kwargs.items() if v is not None}
        for name in ("dropout", "activation_dropout", "attention_dropout", "causal"):
            options.pop(name, None)
        return getattr(twins, found.operator.__name__)(x, *found.args, **options)


def whole_layer(mesh: DeviceMesh) -> None:
    """A Macaron layer of three steps trains for two steps of an optimiser as one in one process."""
    macaron = nn.Sequential(
        FFNStep(D, F, activation="swiglu", dtype=torch.float64),
        AttendStep(D, H, dtype=torch.float64),
        FFNStep(D, F, dtype=torch.float64),
    )
    for parameter in macaron[0].linear1.parameters():
        parameter.requires_grad_(False)
    shares, x = shared_out(macaron, mesh), leaf(B, T, D)
    for module in (macaron, shares):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    same_state(shares, macaron)


def state(mesh: DeviceMesh) -> None:
    """Names and values are the module's own, and go both ways."""
    for name in ("ffn gated", "attend", "attend grouped", "attend to another width"):
        module = build(name)
        shares = shared_out(module, mesh)
        assert list(shares.state_dict()) == list(module.state_dict())
        assert shares.linear1.weight.to_local().numel() < module.linear1.weight.numel() if "ffn" in name else True
        same_state(shares, module)
        other = build(name)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(shares, shaped_like(shares, other.state_dict()), options=options)
        same_state(shares, other)
        module.load_state_dict(shaped_like(module, get_model_state_dict(shares, options=options)))
        same_state(shares, module)


def sharded_once_more(mesh: DeviceMesh) -> None:
    """With FSDP2 over another dimension of the mesh: gradients of both batches, and a state that goes both ways."""
    macaron = nn.Sequential(*(build(name) for name in ("ffn gated", "attend", "attend grouped", "ffn")))
    shares = copy.deepcopy(macaron)
    parallelize_module(shares, mesh["tensor"], tensor_parallel_plan(shares))
    for part in (*shares, shares):
        fully_shard(part, mesh=mesh["data"])
    batches = torch.randn(2, B, T, D, dtype=torch.float64)
    shares(batches[mesh["data"].get_local_rank()]).square().mean().backward()
    (sum(macaron(batch).square().mean() for batch in batches) / 2).backward()
    for (name, parameter), other in zip(shares.named_parameters(), macaron.parameters(), strict=True):
        grad = parameter.grad.full_tensor().view_as(other)
        torch.testing.assert_close(grad, other.grad, msg=lambda text, n=name: f"{n}: {text}")
    same_state(shares, macaron)
    with torch.no_grad():
        for parameter in macaron.parameters():
            parameter.add_(1.0)
    state = shaped_like(shares, macaron.state_dict())
    set_model_state_dict(shares, state, options=StateDictOptions(full_state_dict=True))
    same_state(shares, macaron)


def same_state(shares: nn.Module, module: nn.Module) -> None:
    found, expected = get_model_state_dict(shares, options=StateDictOptions(full_state_dict=True)), module.state_dict()
    found = shaped_like(module, found)
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=lambda text, n=name: f"{n}: {text}")


def drawn_seed(mesh: DeviceMesh) -> None:
    """Without a seed the ranks drop the same, and not the same in every call."""
    torch.manual_seed(dist.get_rank())
    module = FFNStep(D, F, dropout=0.5, dtype=torch.float64)
    shares = shared_out(module, mesh)
    x = torch.linspace(-1, 1, B * T * D, dtype=torch.float64).view(B, T, D)
    first, second = shares(x), shares(x)
    gathered = [torch.empty_like(first) for _ in range(WORLD)]
    dist.all_gather(gathered, first.detach())
    assert torch.equal(*gathered) and not torch.equal(first, second)
    kept = shares.eval()(x) - x
    dropped = (first - x == 0).double().mean()
    assert (kept != 0).all() and 0.2 < dropped < 0.8


def refusals(mesh: DeviceMesh) -> None:
    x = torch.randn(B, T, D)
    for step, message in (
        (FFNStep(D, 5), "dim_feedforward: expected a multiple of the mesh's 2 ranks; got 5"),
        (AttendStep(6, 3), "num_heads: expected a multiple of the mesh's 2 ranks; got 3"),
        (AttendStep(D, H, num_kv_heads=1), "num_kv_heads: expected a multiple of the mesh's 2 ranks; got 1"),
    ):
        refused(ValueError, message, lambda s=step: shared_out(s, mesh))
    for step, name in (
        (FFNStep(D, F, activation_dropout=0.25), "activation_dropout"),
        (AttendStep(D, H, attention_dropout=0.25), "attention_dropout"),
    ):
        shares = shared_out(step, mesh)
        message = f"{name}: expected 0 in training under a tensor-parallel plan; got 0.25"
        refused(ValueError, message, lambda s=shares: s(x))
        torch.testing.assert_close(shares.eval()(x), step.eval()(x))
        refused(RuntimeError, "expected to be called", shares.substep)
    refused(
        TypeError,
        "expected an FFNStep or AttendStep; got Linear",
        lambda: parallelize_module(nn.Linear(2, 2), mesh, ShardedStep()),
    )


def refused(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    try:
        call()
    except error as found:
        assert message in str(found), str(found)
    else:
        raise AssertionError(f"not refused: {message}")


def tests(mesh: DeviceMesh) -> dict[str, Callable[[], None]]:
    found = {name: lambda n=name: same_function(n, mesh) for name in STEPS}
    for name in ("ffn", "attend"):
        for dtype in (torch.float32, torch.bfloat16):
            found[f"{name} {dtype}"] = lambda n=name, d=dtype: by_rule(n, d, mesh)
    for test in (whole_layer, state, drawn_seed, refusals):
        found[test.__name__] = lambda t=test: t(mesh)
    return found


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    if world == WORLD:
        found = tests(init_device_mesh("cpu", (world,)))
    else:
        mesh = init_device_mesh("cpu", (world // WORLD, WORLD), mesh_dim_names=("data", "tensor"))
        found = {"sharded_once_more": lambda: sharded_once_more(mesh)}
    for name, test in found.items():
        torch.manual_seed(0)
        try:
            test()
            said = "passed"
        except Exception:
            said = traceback.format_exc()
        (folder / f"{name} {rank}").write_text(said)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
