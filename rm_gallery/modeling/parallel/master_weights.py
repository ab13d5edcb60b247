"""float32 master weights, and how the gradients of a step are accumulated, summed over ranks and clipped.

`MasterWeights` replicates them on every rank (one process, or DDP); `fsdp.ShardedWeights` shards them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rm_gallery.distributed.collectives import sum_over_ranks
from rm_gallery.distributed.process_group import heartbeat, world_size
from rm_gallery.modeling.reward_model import RewardModel

_BUCKET_NUMEL = 1 << 25  # elements of one all-reduce: 128 MiB of float32


class TrainedWeights(ABC):
    """The parameters that the optimizer updates, replicated or sharded.

    In a step each rank calls `backward` once per micro-batch (all ranks have the same number of micro-batches), then
    `gather_gradients`, steps its optimizer over `named_parameters`, and calls `copy_to_model`.
    """

    device: torch.device
    """Where the model computes; offloaded parameters are in host memory."""
    compute_dtype: torch.dtype
    _named: list[tuple[str, nn.Parameter]]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """float32 parameters under the model's names; DTensors if sharded. `.grad` holds the step's summed gradient."""
        return iter(self._named)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Accumulate a micro-batch's gradients; `is_last` marks the step's last micro-batch.

        loss: this rank's part of a sum over all ranks.
        """
        heartbeat("a backward pass")
        loss.backward()

    def gather_gradients(self, loss: Tensor, max_norm: float) -> tuple[float, float]:
        """Sum loss and gradients over ranks, and clip to a global norm: (loss, norm before clipping).

        loss: 0-dimensional float64, this rank's part of the step's loss. All ranks return the same two numbers, so they
        agree on whether a step is finite. This is the only point of a step that waits for the device.

        Why a sum and no mean: the plan knows the step's number of comparisons C before the first forward pass, and each
        micro-batch's loss is its sum of losses / C. So adding up micro-batches and ranks gives the mean over the step,
        however unevenly the comparisons are spread. Example: rank 0 has 3 comparisons with losses 1, 2, 3 and rank 1
        has one with loss 6. C = 4, the parts are 6/4 and 6/4, their sum is 3 = (1 + 2 + 3 + 6) / 4. The mean of the
        ranks' means would be (2 + 6) / 2 = 4.
        """
        # 1. This rank's gradients: all of them (replicated), or its shards. A rank may hold no row of a small tensor.
        gradients = [_local(each.grad) for _, each in self._named if each.grad is not None]
        gradients = [each for each in gradients if each.numel()]
        # 2. Sum them over ranks where the backward passes did not.
        self._sum_gradients(gradients)
        # 3. Loss and norm of the whole step.
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        loss, norm = self._reduce(loss, norm.to(loss.device))
        # 4. Clip on the device, without looking at the norm on the host.
        if gradients:
            factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))
        loss_value, grad_norm = torch.stack([loss, norm.double()]).tolist()
        return loss_value, grad_norm

    @abstractmethod
    def _sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Sum gradients over ranks in place, where the backward passes did not."""

    def _reduce(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient norm of the whole step, from this rank's loss and the norm of the gradients it holds."""
        return sum_over_ranks(loss, "the end of a step"), norm

    @abstractmethod
    def copy_to_model(self) -> None:
        """Copy the updated master weights into the compute-dtype parameters."""


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class MasterWeights(TrainedWeights):
    """Replicated float32 master weights of a model that computes in another type.

    Without them, in bfloat16, most updates at a learning rate of 5e-7 round to zero (figures in docs/log.md). Each
    micro-batch's gradients are accumulated in float32, and `copy_to_model` casts the weights once a step. Parameters
    that are float32 in the model are their own master weights.

    Under DDP every rank holds all of this, and the float32 gradients are all-reduced once a step;
    torch.nn.parallel.DistributedDataParallel would reduce bfloat16 gradients.
    """

    def __init__(self, model: RewardModel, dtype: torch.dtype) -> None:
        head = set(model.head.parameters())
        self.device = next(model.parameters()).device
        self.compute_dtype = dtype
        self._named = []
        self._copies: list[tuple[nn.Parameter, nn.Parameter]] = []  # (master weight, compute-dtype parameter)
        for name, parameter in model.named_parameters():
            master = parameter
            if dtype != torch.float32 and parameter not in head:
                master = nn.Parameter(parameter.detach().clone())
                parameter.data = parameter.data.to(dtype)
                parameter.register_post_accumulate_grad_hook(_accumulate_into(master))
                self._copies.append((master, parameter))
            elif dtype != torch.float32:  # a view of the memory-mapped file would keep the whole file in memory
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
    """Consecutive tensors of at most `_BUCKET_NUMEL` elements together; a larger tensor has its own bucket."""
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


def _accumulate_into(master: nn.Parameter) -> Callable[[Tensor], None]:
    """A hook that adds a parameter's gradient to its master weight's, in float32, and frees it."""

    def accumulate(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return accumulate


@torch.no_grad()
def broadcast_from_rank_0(model: nn.Module) -> None:
    """Overwrite parameters and buffers with those of rank 0, in case model folders differ between machines."""
    if world_size() > 1:
        heartbeat("the weights of rank 0")
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, src=0)
