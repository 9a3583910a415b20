"""A tensor-parallel plan for :class:`FFNStep` and :class:`AttendStep`: hidden units and heads shared out over ranks.

    y = a x + c (sum_r W_out^r act(W_in^r N(x) + b_in^r) + b_out),    the same for heads

Rank r holds a block of rows of ``W_in`` (of the gate's and of the other half, or of q, k and v) and the same columns
of ``W_out``, and runs the fused operator on them, without the residual; ``c b_out`` is the first rank's. The sum over
ranks is torch's all-reduce, and so is that of the gradients in x and in the parameters that all ranks read. The
residual, and a post-norm, follow the sum. Source: Shoeybi et al. 2019, arXiv 1909.08053.

The sum is formed in the dtype of x: each rank's part is rounded once, then each partial sum, then y. To add the
residual in the first rank's part would save a pass over y, but each partial sum would be rounded as coarsely as y is:
in bfloat16 over 8 ranks twice the error.

This module imports ``torch.distributed``; ``macaron_ops.nn`` does not import it.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.func import functional_call

from macaron_ops.ops import Substep, split_layer

from .attend_step import AttendStep
from .ffn_step import FFNStep
from .split_layer import SplitLayer
from .split_stack import SplitStack

__all__ = ["ShardedStep", "shaped_like", "tensor_parallel_plan"]


def tensor_parallel_plan(module: nn.Module) -> dict[str, ParallelStyle]:
    """The plan of ``torch.distributed.tensor.parallel.parallelize_module`` for all steps in ``module``.

    Example::

        mesh = init_device_mesh("cuda", (2,))
        layer = nn.Sequential(FFNStep(512, 1024), AttendStep(512, 8), FFNStep(512, 1024))  # a Macaron layer
        parallelize_module(layer, mesh, tensor_parallel_plan(layer))

    Parameters keep their names and values, as DTensors, and torch.distributed saves, loads and optimises them. A matrix
    of several blocks of rows (gate and up; q, k and v), each of which is shared out, becomes ``(blocks, rows, D)``:
    torch's plain sharding of its second dimension, which FSDP2 (``fully_shard`` after the plan, over another dimension
    of the mesh) shards once more. :func:`shaped_like` goes between these shapes and those without a plan.

    Raises:
        ValueError: ``module`` has no step, or one that runs inside a larger node (``SplitLayer``, ``SplitStack``),
            where no sum over ranks can come between.
    """
    steps = []
    for name, part in module.named_modules():
        if isinstance(part, (SplitLayer, SplitStack)):
            raise ValueError(
                f"module: expected steps that run by themselves; got the {type(part).__name__} {name!r}, which is one "
                "node. Build the layer of FFNStep and AttendStep"
            )
        if isinstance(part, (FFNStep, AttendStep)):
            steps.append(name)
    if not steps:
        raise ValueError(f"module: expected one with an FFNStep or AttendStep; got {type(module).__name__}")
    return {name: ShardedStep() for name in steps}


class ShardedStep(ParallelStyle):
    """Shares an :class:`FFNStep` or :class:`AttendStep` out over a mesh of one dimension.

    Input and output are plain tensors that all ranks have whole. Dropout of the output has the mask of the step
    without a plan (the first rank's seed is sent to the others); that of hidden units and of attention weights is
    refused in training, for a rank cannot tell its units' masks from the others'.

    Raises:
        TypeError: another module. ValueError: hidden units or heads are not a multiple of the ranks.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        ranks = device_mesh.size()
        # How many blocks of rows a parameter has, each of which is shared out.
        if type(module) is FFNStep:
            _require_multiple("dim_feedforward", module.linear2.in_features, ranks)
            blocks = {"linear1": module.linear1.out_features // module.linear2.in_features}
            columns, sharded = "linear2.weight", _ShardedFFNStep
        elif type(module) is AttendStep:
            _require_multiple("num_heads", module.num_heads, ranks)
            _require_multiple("num_kv_heads", module.num_kv_heads, ranks)
            blocks = {"q_proj": 1, "k_proj": 1, "v_proj": 1}
            if module.num_kv_heads == module.num_heads:  # else q is larger than k and v, and all ranks hold all rows
                blocks["in_proj"] = 3
            columns, sharded = "out_proj.weight", _ShardedAttendStep
        else:
            raise TypeError(f"module: expected an FFNStep or AttendStep; got {type(module).__name__}")
        for name, parameter in list(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            linear, whole, placement = module.get_submodule(owner), parameter.detach(), Replicate()
            if name == columns:
                placement = Shard(1)
            elif blocks.get(owner) == 1:
                placement = Shard(0)
            elif owner in blocks:
                whole, placement = whole.unflatten(0, (blocks[owner], -1)), Shard(1)
            shared = distribute_tensor(whole, device_mesh, [placement], src_data_rank=self.src_data_rank)
            linear.register_parameter(leaf, nn.Parameter(shared, requires_grad=parameter.requires_grad))
        module.__class__ = sharded
        return module


def shaped_like(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with the shapes that ``module`` has, between models with and without a plan.

    Example::

        options = StateDictOptions(full_state_dict=True)
        plain.load_state_dict(shaped_like(plain, get_model_state_dict(sharded, options=options)))
        set_model_state_dict(sharded, shaped_like(sharded, plain.state_dict()), options=options)
    """
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    return {name: tensor.view(shapes.get(name, tensor.shape)) for name, tensor in state.items()}


def _require_multiple(name: str, value: int, ranks: int) -> None:
    if value % ranks:
        raise ValueError(f"{name}: expected a multiple of the mesh's {ranks} ranks; got {value}")


class _Sharded:
    """Put before a step's class: its forward on this rank's share, and the sum."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        step = super().substep(*args, **kwargs)
        mesh = step.args[2].device_mesh
        options = {name: _local(value, mesh) for name, value in step.kwargs.items()}
        for name in ("activation_dropout", "attention_dropout"):
            if options.get(name):
                raise ValueError(f"{name}: expected 0 in training under a tensor-parallel plan; got {options[name]}")
        if options["dropout"] and options["seed"] is None:
            options["seed"] = _common_seed(x, mesh)
        post = options["placement"] == "post" and options["norm"] is not None
        if post:
            options |= {"norm": None, "norm_weight": None, "norm_bias": None, "placement": "pre"}
        residual_scale, options["residual_scale"] = options["residual_scale"], 0.0
        w_in, b_in, w_out, b_out, *heads = (_local(value, mesh) for value in step.args)
        if not isinstance(w_in, tuple) and w_in.dim() == 3:
            w_in, b_in = w_in.flatten(0, 1), None if b_in is None else b_in.flatten()
        if mesh.get_local_rank() > 0 and b_out is not None:
            b_out = 0.0 * b_out  # not None: all ranks take part in its gradient's sum
        arguments = self._share((w_in, b_in, w_out, b_out, *heads), options, mesh)
        part = split_layer(_local(x, mesh), [Substep(step.operator, arguments, options)], save=self.save)
        total = DTensor.from_local(part, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()])
        y = torch.add(total.to_local(), x, alpha=residual_scale)
        if not post:
            return y
        norm = {name: parameter.to_local() for name, parameter in self.norm.named_parameters()}
        return functional_call(self.norm, norm, (y,))

    def substep(self, *args: object, **kwargs: object) -> Substep:
        raise RuntimeError(
            f"{type(self).__name__}: expected to be called; its sum over ranks is no part of a larger node"
        )

    def _share(self, arguments: tuple, options: dict[str, object], mesh: DeviceMesh) -> tuple:
        return arguments


class _ShardedFFNStep(_Sharded, FFNStep):
    pass


class _ShardedAttendStep(_Sharded, AttendStep):
    def _share(self, arguments: tuple, options: dict[str, object], mesh: DeviceMesh) -> tuple:
        weights, biases, w_out, b_out, heads = arguments
        ranks, rank = mesh.size(), mesh.get_local_rank()
        mask = options["attn_mask"]
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (-1, heads))
        if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
            options["attn_mask"] = mask.chunk(ranks, dim=1)[rank]
        options["num_kv_heads"] //= ranks
        if self.context_dim is None and self.num_kv_heads != self.num_heads:
            weights = self._rows(weights, ranks, rank)
            biases = None if biases is None else self._rows(biases, ranks, rank)
        return weights, biases, w_out, b_out, heads // ranks

    def _rows(self, packed: Tensor, ranks: int, rank: int) -> tuple[Tensor, ...]:
        """This rank's rows of q, k and v, views."""
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return tuple(part.chunk(ranks)[rank] for part in packed.split([width, kv_width, kv_width]))


def _local(value: object, mesh: DeviceMesh) -> object:
    """A rank's own tensor. Where all ranks have the same one, its gradient is the sum of theirs."""
    if isinstance(value, tuple):
        return tuple(_local(v, mesh) for v in value)
    if not isinstance(value, Tensor):
        return value
    if not isinstance(value, DTensor):
        if not value.requires_grad:
            return value
        value = DTensor.from_local(value, mesh, [Replicate()], run_check=False)
    if not value.placements[0].is_replicate():
        return value.to_local()
    # The redistribution does nothing forward. Backward it is the all-reduce.
    return value.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def _common_seed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """One that the first rank draws, for all."""
    seed = torch.randint(2**62, (), device=x.device)
    dist.broadcast(seed, group=mesh.get_group(), group_src=0)
    return seed
