"""FSDP2 (`torch.distributed.fsdp.fully_shard`): sharded parameters and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rm_gallery.distributed.collectives import sum_over_ranks
from rm_gallery.distributed.process_group import World, heartbeat, init_single_process
from rm_gallery.modeling.meta_init import WeightFiles
from rm_gallery.modeling.parallel.master_weights import TrainedWeights, accumulate_in_float32
from rm_gallery.modeling.reward_model import RewardModel

_NETWORK = "network."  # prefix of the transformers model's names in RewardModel


@dataclass(frozen=True)
class ShardingSpec:
    """How parameters are sharded across ranks."""

    dtype: torch.dtype
    """Compute dtype of the backbone. Gradients are reduced in float32, and the head computes in float32."""
    group_size: int
    """Ranks per sharding group. With several groups each holds a replica of the model (hybrid sharding, HSDP)."""
    min_num_params: int = 0
    """Smallest module, in parameters, that is sharded on its own; 0 shards each transformer layer."""
    has_masters: bool = True
    """Shards are float32; else the backbone's are in the compute dtype, and their gradients are accumulated in float32.
    FSDP2 rounds the gradient of each micro-batch to the compute dtype after its reduction in float32."""
    offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory."""


def transformer_layers(model: RewardModel) -> list[nn.Module]:
    """The transformer layers of the backbone, in order."""
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
    # fully_shard all-gathers parameters in a forward pre-hook, so a wrapped module must be called. The network of a
    # decoder is not (its backbone is called instead), and some embeddings are read without a call.
    never = {model, model.network}
    embeddings = model.network.get_input_embeddings()
    if not any(True for _ in model.head.parameters()):  # a language model reads its output layer without a call
        output = model.network.get_output_embeddings()
        never |= {embeddings, output}
        if output.weight is embeddings.weight:  # tied parameters must be in one unit, that of the root
            never |= {module for module in model.modules() if embeddings in set(module.modules())}

    def visit(module: nn.Module) -> int:
        """Number of parameters in `module` that no module in `found` owns."""
        if module in head:
            return 0
        if hasattr(module, "lora_A"):  # one unit: DoRA reads the weights of its parts without a call
            left = sum(parameter.numel() for parameter in module.parameters())
        else:
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
    """Shard the model in place and return its sharded weights. A collective.

    files: for a model on the meta device, the files from which each rank reads its rows; None for a model that is
    materialized on every rank.
    """
    if world.world_size == 1:
        init_single_process()
    head = set(model.head.parameters())
    for parameter in model.parameters():
        # No float32 shard of frozen ones (LoRA), nor without master weights.
        if not parameter.requires_grad or not (spec.has_masters or parameter in head):
            parameter.data = parameter.data.to(spec.dtype)
    _fully_shard(model, spec, _mesh(spec, world), world)
    if files is not None:
        heartbeat("reading the weights")
        # The DTensors of the state dict share memory with the parameters.
        files.load_into({name.removeprefix(_NETWORK): value for name, value in model.state_dict().items()})
    return ShardedWeights(model, spec, world)


def _mesh(spec: ShardingSpec, world: World) -> DeviceMesh:
    """Mesh of shape [ranks], or [groups, ranks per group]: 8 ranks with a group size of 4 are [2, 4]."""
    if spec.group_size == world.world_size:
        return init_device_mesh(world.device.type, (world.world_size,), mesh_dim_names=("shard",))
    shape = (world.world_size // spec.group_size, spec.group_size)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def _fully_shard(model: RewardModel, spec: ShardingSpec, mesh: DeviceMesh, world: World) -> None:
    """Convert parameters to DTensors; allocate this rank's shards of parameters on the meta device, uninitialized."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if spec.offload else OffloadPolicy()
    # Inputs need no cast: token ids are integers, and activations already have the compute dtype.
    full = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    mixed = MixedPrecisionPolicy(param_dtype=spec.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    head = list(model.head.parameters())
    for module in modules_to_shard(model, spec.min_num_params):
        fully_shard(module, mesh=mesh, mp_policy=mixed, offload_policy=offload)
    if head:  # of a language model there is none, and the root has the output layer
        fully_shard(model.head, mesh=mesh, mp_policy=full, offload_policy=offload)
    fully_shard(model, mesh=mesh, mp_policy=mixed, offload_policy=offload)
    device = torch.device("cpu") if spec.offload else world.device
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    for first, *others in tied.values():  # `_apply` replaces a parameter in each module by another one
        for name in others:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, model.get_parameter(first))


class ShardedWeights(TrainedWeights):
    """Sharded float32 parameters, which FSDP2 all-gathers in the compute dtype before each forward and backward."""

    def __init__(self, model: RewardModel, spec: ShardingSpec, world: World) -> None:
        self.device, self.compute_dtype = world.device, spec.dtype
        self._model = model
        self._world_size = world.world_size
        self._num_replicas = world.world_size // spec.group_size
        self._named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        for _, parameter in self._named:
            if parameter.dtype != torch.float32:
                accumulate_in_float32(parameter)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Accumulate a micro-batch's gradients: reduce-scatter within a group, all-reduce across groups after the last.

        Gradient scaling, for a loss L = sum over ranks of L_r, where L_r is `loss` on rank r:
        1. FSDP2 averages: world_size W ranks that call L_r.backward() get (sum of dL_r) / W. Both reductions together
           divide by W, with several groups too.
        2. So each rank backpropagates W * L_r, and gets sum of dL_r = dL.
        Example: W = 2, dL_0 = 1, dL_1 = 3. FSDP2 averages 2 * 1 and 2 * 3 to 4 = 1 + 3.
        """
        heartbeat("a backward pass")
        if self._num_replicas > 1:
            self._model.set_requires_all_reduce(is_last)  # type: ignore[operator]
        (loss * self._world_size).backward()

    def _sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Does nothing: FSDP2 reduces gradients in the backward pass."""

    def _sum_added(self, gradients: Sequence[Tensor]) -> None:
        for gradient in gradients:  # which FSDP2 does not average, see `backward`
            dist.all_reduce(gradient.div_(self._world_size))

    def copy_to_model(self) -> None:
        """Free what FSDP2 has all-gathered outside the layers, which it keeps after a forward pass without backward.

        It casts the float32 shards in the next all-gather.
        """
        self._model.reshard()  # type: ignore[operator]

    def _reduce(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        # 1. `norm` covers this rank's shards, so the squared global norm is the sum of squares over ranks.
        # 2. Every group holds each element once, so that sum counts it once per group: divide by the number of groups.
        pair = torch.stack([loss, norm.double().square() / self._num_replicas])
        loss, square = sum_over_ranks(pair, "the end of a step")
        return loss, square.sqrt().float()
