"""FSDP2 (`torch.distributed.fsdp.fully_shard`): sharded parameters, and the training step on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rm_gallery.distributed.collectives import sum_over_ranks
from rm_gallery.distributed.process_group import World, heartbeat, init_single_process
from rm_gallery.modeling.meta_init import WeightFiles
from rm_gallery.modeling.parallel.master_weights import TrainedWeights
from rm_gallery.modeling.reward_model import RewardModel

_NETWORK = "network."  # prefix of the network's parameter names inside RewardModel


@dataclass(frozen=True)
class ShardingSpec:
    """How parameters are sharded across ranks."""

    dtype: torch.dtype
    """Compute type of the backbone. Gradients are reduced in float32; the head computes in float32."""
    group_size: int
    """HostGroup of one sharding group. Groups replicate each other (hybrid sharding)."""
    min_num_params: int = 0
    """Smallest module, in parameters, that is sharded on its own; 0 shards each transformer layer."""
    offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory."""


def transformer_layers(model: RewardModel) -> list[nn.Module]:
    """The layers of the backbone, in order."""
    depth = model.network.config.num_hidden_layers
    head = set(model.head.modules())
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    return [layer for layers in lists for layer in layers if layer not in head]


def modules_to_shard(model: RewardModel, min_num_params: int) -> list[nn.Module]:
    """The modules that `fully_shard` wraps on their own, inner ones first; the root takes all other parameters."""
    if not min_num_params:
        return transformer_layers(model)
    head = set(model.head.modules())
    found: list[nn.Module] = []
    # fully_shard gathers parameters in a hook of `forward`. Nothing calls the network of a decoder (the backbone is
    # called instead), and some embeddings are read without being called.
    never = {model, model.network}
    embeddings = model.network.get_input_embeddings()

    def visit(module: nn.Module) -> int:
        """Number of parameters in `module` that no module in `found` owns."""
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


def shard(model: RewardModel, files: WeightFiles | None, spec: ShardingSpec, world: World) -> ShardedWeights:
    """Shard the model in place.

    files: for a model on the meta device, the files from which each rank reads its rows; None for a model that each
    rank holds as a whole.
    """
    if world.world_size == 1:
        init_single_process()
    _fully_shard(model, spec, _mesh(spec, world), world)
    if files is not None:
        heartbeat("reading the weights")
        # The DTensors of the state dict share their memory with the parameters.
        files.load_into({name.removeprefix(_NETWORK): value for name, value in model.state_dict().items()})
    return ShardedWeights(model, spec, world)


def _mesh(spec: ShardingSpec, world: World) -> DeviceMesh:
    """[ranks]; with smaller groups [groups, ranks of a group]: 8 ranks in groups of 4 are [2, 4]."""
    if spec.group_size == world.world_size:
        return init_device_mesh(world.device.type, (world.world_size,), mesh_dim_names=("shard",))
    shape = (world.world_size // spec.group_size, spec.group_size)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def _fully_shard(model: RewardModel, spec: ShardingSpec, mesh: DeviceMesh, world: World) -> None:
    """Turn each parameter into a DTensor, and give parameters on the meta device memory for this rank's shard."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if spec.offload else OffloadPolicy()
    # Inputs need no cast: token ids are integers, and activations have the compute type already.
    full = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    mixed = MixedPrecisionPolicy(param_dtype=spec.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in modules_to_shard(model, spec.min_num_params):
        fully_shard(module, mesh=mesh, mp_policy=mixed, offload_policy=offload)
    fully_shard(model.head, mesh=mesh, mp_policy=full, offload_policy=offload)
    fully_shard(model, mesh=mesh, mp_policy=mixed, offload_policy=offload)
    device = torch.device("cpu") if spec.offload else world.device
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)


class ShardedWeights(TrainedWeights):
    """Sharded float32 parameters: FSDP2 all-gathers them in the compute type where the model uses them."""

    def __init__(self, model: RewardModel, spec: ShardingSpec, world: World) -> None:
        self.device, self.compute_dtype = world.device, spec.dtype
        self._model = model
        self._world_size = world.world_size
        self._num_replicas = world.world_size // spec.group_size
        self._named = list(model.named_parameters())

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Accumulate a micro-batch's gradients, reduce-scattered in the group; replicas all-reduce after the last."""
        heartbeat("a backward pass")
        if self._num_replicas > 1:
            self._model.set_requires_all_reduce(is_last)  # type: ignore[operator]
        # FSDP2 averages gradients over all ranks. Our loss is a part of a sum over ranks, so undo the division.
        (loss * self._world_size).backward()

    def _sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Nothing to do: FSDP2 reduces gradients in the backward pass."""

    def copy_to_model(self) -> None:
        """Nothing to do: FSDP2 casts the float32 shards in each all-gather."""

    def _reduce(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        # Each element of the gradient lies on one rank of every group. So the sum of squares over all ranks counts it
        # once per group, and each rank divides its part by the number of groups.
        pair = torch.stack([loss, norm.double().square() / self._num_replicas])
        loss, square = sum_over_ranks(pair, "the end of a step")
        return loss, square.sqrt().float()
