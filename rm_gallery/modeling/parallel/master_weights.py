"""float32 master weights, and the accumulation, reduction over ranks and clipping of their gradients.

`MasterWeights` replicates them on every rank (one process, or DDP); `fsdp.ShardedWeights` shards them across ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rm_gallery.distributed.collectives import sum_over_ranks
from rm_gallery.distributed.process_group import heartbeat, world_size
from rm_gallery.modeling.reward_model import RewardModel

_BUCKET_NUMEL = 1 << 25  # elements per all-reduce: 128 MiB of float32


class TrainedWeights(ABC):
    """The parameters that the optimizer updates, replicated or sharded: float32, or bfloat16 without master weights.

    A training step on every rank: `backward` for each micro-batch (the same number on all ranks), `gather_gradients`,
    the optimizer's step over `named_parameters`, `copy_to_model`.
    """

    device: torch.device
    """Device of the computation; offloaded parameters are in host memory."""
    compute_dtype: torch.dtype
    _named: list[tuple[str, nn.Parameter]]
    _added: Mapping[str, nn.Parameter] = {}

    def add(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Train float32 parameters that are not the model's too: those of an objective, whole on every rank."""
        for parameter in parameters.values():
            parameter.data = parameter.data.to(self.device)
        self._added = {**self._added, **parameters}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters under the model's names, DTensors if sharded, and those that were added.

        `.grad` is the step's gradient, float32.
        """
        return iter([*self._named, *self._added.items()])

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Accumulate the gradients of a micro-batch.

        loss: the micro-batch's sum of losses divided by the number of comparisons of the step, over all ranks and
        micro-batches. is_last: this is the step's last micro-batch.
        """
        heartbeat("a backward pass")
        loss.backward()

    def gather_gradients(self, loss: Tensor, max_norm: float) -> tuple[float, float]:
        """Sum loss and gradients over ranks, and clip the gradients by their global norm in place.

        loss: 0-dimensional float64, the sum of this rank's losses passed to `backward`. Returns (loss, gradient norm
        before clipping) of the step, equal on all ranks, so that all ranks agree on whether a step is finite. This is
        the step's only synchronization with the device.

        Gradients are summed, not averaged, because the division by the global number of comparisons C is in the loss
        already. So the step's loss is the mean over its comparisons, regardless of how they are distributed. Example:
        rank 0 has 3 comparisons with losses 1, 2, 3 and rank 1 has one with loss 6. C = 4, the ranks' losses are 6/4
        and 6/4, and their sum is 3 = (1 + 2 + 3 + 6) / 4. The mean of the ranks' means would be (2 + 6) / 2 = 4.
        """
        # 1. Local gradients: whole tensors (replicated) or this rank's shards. A shard of a small tensor may be empty.
        gradients = [local(each.grad) for _, each in self._named if each.grad is not None]
        gradients = [each for each in gradients if each.numel()]
        # 2. Sum over ranks: an all-reduce if replicated. FSDP2 has reduced sharded gradients in the backward passes.
        self._sum_gradients(gradients)
        added = [each.grad for each in self._added.values() if each.grad is not None]
        self._sum_added(added)
        # 3. Division by the global count: done. Each micro-batch's loss was divided by C before its backward pass.
        # 4. Global norm, from each rank's local norm; and the step's loss, in the same all-reduce if sharded.
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        loss, norm = self._reduce(loss, norm.to(loss.device))
        if added:
            norm = torch.hypot(norm, torch.nn.utils.get_total_norm(added).to(norm.device))
        # 5. Clipping: scale by min(1, max_norm / norm), computed on the device so that it does not wait for the host.
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        if gradients:
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))
        if added:
            torch._foreach_mul_(added, factor)
        loss_value, grad_norm = torch.stack([loss, norm.double()]).tolist()
        return loss_value, grad_norm

    @abstractmethod
    def _sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Sum gradients over ranks in place, unless the backward passes did."""

    def _sum_added(self, gradients: Sequence[Tensor]) -> None:
        """Sum the gradients of added parameters over ranks in place."""
        self._sum_gradients(gradients)

    def _reduce(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and global gradient norm of the step, from this rank's loss and the norm of its local gradients."""
        return sum_over_ranks(loss, "the end of a step"), norm

    @abstractmethod
    def copy_to_model(self) -> None:
        """Copy the updated master weights into the compute-dtype parameters."""


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor as it is. It shares the memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class MasterWeights(TrainedWeights):
    """float32 master weights of the trained parameters, replicated on every rank; the model computes in `dtype`.

    Without them, in bfloat16, most updates at a learning rate of 5e-7 round to zero (figures in docs/log.md). Gradients
    are accumulated in float32, and `copy_to_model` casts the weights once per step. A parameter whose compute dtype is
    float32 is its own master weight.

    Under DDP the float32 gradients are all-reduced once per step; torch.nn.parallel.DistributedDataParallel would
    reduce bfloat16 gradients.
    """

    def __init__(self, model: RewardModel, dtype: torch.dtype, *, has_masters: bool = True) -> None:
        """has_masters: False keeps the weights in `dtype` only, the head's excepted; `optim.py` rounds their updates.

        Their gradients are float32 nevertheless.
        """
        head = set(model.head.parameters())
        self.device = next(model.parameters()).device
        self.compute_dtype = dtype
        self._named = []
        self._copies: list[tuple[nn.Parameter, nn.Parameter]] = []  # (master weight, compute-dtype parameter)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:  # frozen (LoRA): no master weight
                if parameter.is_floating_point():  # not quantized
                    parameter.data = parameter.data.to(dtype)
                continue
            master = parameter
            if dtype != torch.float32 and parameter not in head and not has_masters:
                parameter.data = parameter.data.to(dtype)
                accumulate_in_float32(parameter)
            elif dtype != torch.float32 and parameter not in head:
                master = nn.Parameter(parameter.detach().clone())
                parameter.data = parameter.data.to(dtype)
                parameter.register_post_accumulate_grad_hook(_accumulate_into(master))
                self._copies.append((master, parameter))
            elif dtype != torch.float32:  # a view would keep the whole memory-mapped file in memory
                parameter.data = parameter.data.clone()
            self._named.append((name, master))

    def _sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        if world_size() == 1:
            return
        heartbeat("the sum of gradients")
        for bucket in _buckets(gradients):
            flat = torch.cat([each.reshape(-1) for each in bucket])
            dist.all_reduce(flat)
            summed = flat.split([each.numel() for each in bucket])
            torch._foreach_copy_(bucket, [part.view_as(each) for part, each in zip(summed, bucket, strict=True)])

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Copy the updated master weights into the compute-dtype parameters."""
        if self._copies:
            torch._foreach_copy_([copy for _, copy in self._copies], [master for master, _ in self._copies])


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Group consecutive tensors up to `_BUCKET_NUMEL` elements; a larger tensor is a bucket of its own."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > _BUCKET_NUMEL:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def accumulate_in_float32(parameter: nn.Parameter) -> None:
    """Let a narrower parameter have a float32 gradient, to which those of further micro-batches are added."""

    def widen(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad = parameter.grad.float()

    parameter.grad_dtype = None  # any
    parameter.register_post_accumulate_grad_hook(widen)


def _accumulate_into(master: nn.Parameter) -> Callable[[Tensor], None]:
    """Post-accumulate-grad hook: add the gradient to the master weight's in float32, and free it."""

    def accumulate(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return accumulate


@torch.no_grad()
def broadcast_from_rank_0(model: nn.Module) -> None:
    """Broadcast parameters and buffers of rank 0, in case model folders differ between nodes."""
    if world_size() > 1:
        heartbeat("the weights of rank 0")
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, src=0)
