"""Weights cut over the processes: torch's FSDP1 and FSDP2 behind one interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rm_gallery.distributed.process_group import World, join_alone, sum_over_ranks, turn
from rm_gallery.modeling.meta_init import WeightFiles
from rm_gallery.modeling.parallel.master_weights import TrainedWeights, matrix_names
from rm_gallery.modeling.reward_model import RewardModel

_NETWORK = "network."  # what a RewardModel puts before its network's names
_WRAPPED = "_fsdp_wrapped_module."  # what FSDP1 puts between them


@dataclass(frozen=True)
class Cut:
    """How weights are cut over processes."""

    engine: Literal["fsdp", "fsdp2"]
    dtype: torch.dtype
    """Type that the backbone computes in; gradients are summed in float32, and the head computes in it."""
    group_size: int
    """Processes of one group, over which the weights are cut; the groups hold copies of each other."""
    min_num_params: int = 0
    """Least parameters of a module that is gathered on its own; 0 takes each transformer layer."""
    offload: bool = False
    """Weights, gradients and optimizer state lie in host memory."""


def units(model: RewardModel, min_num_params: int) -> list[nn.Module]:
    """The modules that are gathered on their own, inner ones first; what is left is gathered with the whole model."""
    head = set(model.head.modules())
    if not min_num_params:
        depth = model.network.config.num_hidden_layers
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
        return [layer for layers in lists for layer in layers if layer not in head]
    found: list[nn.Module] = []
    # Nothing calls the network of a decoder, and some embeddings are read without being called.
    never = {model, model.network}
    embeddings = model.network.get_input_embeddings()

    def visit(module: nn.Module) -> int:
        """Parameters in here that are in no unit yet."""
        if module in head:
            return 0
        left = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        left += sum(visit(child) for child in module.children())
        is_called = not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Embedding) or module is embeddings
        if left < min_num_params or not is_called or module in never:
            return left
        found.append(module)
        return 0

    visit(model)
    return found


def shard(model: RewardModel, files: WeightFiles | None, cut: Cut, world: World) -> tuple[RewardModel, ShardedWeights]:
    """Cut the weights over the processes: the model to call, and its weights.

    files: where each process reads its part from, for a model without weights; None for one that is whole in each.
    """
    if world.world_size == 1:
        join_alone()
    mesh = _mesh(cut, world)
    matrices = matrix_names(model)
    make = _fully_shard if cut.engine == "fsdp2" else _fsdp1
    model = make(model, cut, mesh, world)
    if files is not None:
        _fill(model, files)
    return model, ShardedWeights(model, cut, world, matrices)


def _mesh(cut: Cut, world: World) -> DeviceMesh:
    if cut.group_size == world.world_size:
        return init_device_mesh(world.device.type, (world.world_size,), mesh_dim_names=("shard",))
    shape = (world.world_size // cut.group_size, cut.group_size)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def _fully_shard(model: RewardModel, cut: Cut, mesh: DeviceMesh, world: World) -> RewardModel:
    """FSDP2: each parameter becomes a DTensor."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if cut.offload else OffloadPolicy()
    # Inputs are not cast: token numbers stay what they are, and activations have the backbone's type already.
    plain = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    mixed = MixedPrecisionPolicy(param_dtype=cut.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in units(model, cut.min_num_params):
        fully_shard(unit, mesh=mesh, mp_policy=mixed, offload_policy=offload)
    fully_shard(model.head, mesh=mesh, mp_policy=plain, offload_policy=offload)
    fully_shard(model, mesh=mesh, mp_policy=mixed, offload_policy=offload)
    weights_lie = torch.device("cpu") if cut.offload else world.device
    model._apply(lambda each: torch.empty_like(each, device=weights_lie) if each.is_meta else each)
    return model


def _fsdp1(model: RewardModel, cut: Cut, mesh: DeviceMesh, world: World) -> RewardModel:
    """FSDP1: each module's parameters become one flat piece. The wrapper passes attributes on to the model."""
    from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel, MixedPrecision, ShardingStrategy
    from torch.distributed.fsdp.wrap import CustomPolicy

    on_their_own = set(units(model, cut.min_num_params))
    head = model.head
    as_it_is: dict[str, Any] = {"cast_forward_inputs": False, "cast_root_forward_inputs": False}
    plain = MixedPrecision(reduce_dtype=torch.float32, **as_it_is)
    mixed = MixedPrecision(param_dtype=cut.dtype, reduce_dtype=torch.float32, **as_it_is)

    def policy(module: nn.Module) -> bool | dict[str, Any]:
        return {"mixed_precision": plain} if module is head else module in on_their_own

    def materialize(module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty_like(parameter, device=world.device)
            setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))

    is_outline = any(parameter.is_meta for parameter in model.parameters())
    wrapped = FullyShardedDataParallel(
        model,
        device_mesh=mesh,
        sharding_strategy=ShardingStrategy.FULL_SHARD if mesh.ndim == 1 else ShardingStrategy.HYBRID_SHARD,
        auto_wrap_policy=CustomPolicy(policy),
        mixed_precision=mixed,
        cpu_offload=CPUOffload(offload_params=True) if cut.offload else None,
        param_init_fn=materialize if is_outline else None,
        device_id=world.device,
        use_orig_params=True,
    )
    return wrapped  # type: ignore[return-value]


def _fill(model: RewardModel, files: WeightFiles) -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    turn("reading the weights")
    state: dict[str, Any] = get_model_state_dict(model)
    files.fill({name.removeprefix(_NETWORK): value for name, value in state.items()})
    set_model_state_dict(model, state)


class ShardedWeights(TrainedWeights):
    """float32 weights of which each process holds its part, gathered in the compute type where they are used."""

    def __init__(self, model: RewardModel, cut: Cut, world: World, matrices: frozenset[str]) -> None:
        self.device, self.compute_dtype = world.device, cut.dtype
        self.cut, self._model, self._matrices = cut, model, matrices
        self._num_processes = world.world_size
        self._num_copies = world.world_size // cut.group_size
        self._named = [(name.replace(_WRAPPED, ""), parameter) for name, parameter in model.named_parameters()]
        # With offloaded weights FSDP1 puts each gradient in the place of the one before.
        self.adds_up_by_itself = not (cut.engine == "fsdp" and cut.offload)
        self._sums: dict[nn.Parameter, Tensor] = {}

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add a micro-batch's gradients, summed over the processes and cut."""
        turn("a backward pass")
        if self.cut.engine == "fsdp2" and self._num_copies > 1:
            self._model.set_requires_all_reduce(is_last)  # type: ignore[operator]
        # Both engines take the mean over the processes, and the loss is a part of a sum.
        (loss * self._num_processes).backward()
        if not self.adds_up_by_itself:
            self._add_up(is_last)

    @torch.no_grad()
    def _add_up(self, is_last: bool) -> None:
        for _, parameter in self._named:
            if parameter.grad is None:
                continue
            if is_last:
                if parameter in self._sums:
                    parameter.grad.add_(self._sums.pop(parameter))
                continue
            if parameter in self._sums:
                self._sums[parameter].add_(parameter.grad)
            else:
                self._sums[parameter] = parameter.grad.clone()
            parameter.grad = None

    def _sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Both engines did that in the backward pass."""

    def publish(self) -> None:
        """Both engines gather the updated weights where the model uses them."""

    def _over_processes(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        # Each number of the gradient lies in one process of every group: its square is counted once.
        pair = torch.stack([loss, norm.double().square() / self._num_copies])
        loss, square = sum_over_ranks(pair, "the end of a step")
        return loss, square.sqrt().float()

    def state_dict(self, model: RewardModel) -> dict[str, Tensor]:
        """The library model's state, each tensor a DTensor of which this process holds its part.

        Every process must call it, since FSDP1 gathers and cuts again.
        """
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        turn("the state of the model")
        state: dict[str, Any] = get_model_state_dict(model)
        return {name.removeprefix(_NETWORK): value for name, value in state.items()}
