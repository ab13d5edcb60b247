"""The float32 weights that the optimizer updates, and how the gradients of a step come together.

`MasterWeights` keeps all of them in each process (one process, or `ddp`); `fsdp.py` has those that are cut over
the processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rm_gallery.distributed.process_group import sum_over_ranks, turn, world_size
from rm_gallery.modeling.reward_model import RewardModel

_BUCKET = 1 << 25  # numbers of one all-reduce: 128 MiB


class TrainedWeights(ABC):
    """What a training loop does with weights, however they lie.

    Each process calls `backward` for its micro-batches (all have equally many), `gather_gradients` once, steps its
    optimizer over `named_parameters`, and calls `publish`.
    """

    device: torch.device
    """Where the model computes; offloaded weights lie elsewhere."""
    compute_dtype: torch.dtype
    _named: list[tuple[str, nn.Parameter]]
    _matrices: frozenset[str]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """float32 parameters under the model's names; their `.grad` holds the step's summed gradient.

        Cut over processes they are DTensors (`fsdp2`), or flat pieces of which some are empty (`fsdp`).
        """
        return iter(self._named)

    def is_matrix(self, name: str) -> bool:
        """Whether the whole parameter has two axes or more; a flat piece of it does not show that."""
        return name in self._matrices

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add a micro-batch's gradients; `is_last` in the step.

        loss: this process's part of a sum over all processes.
        """
        turn("a backward pass")
        loss.backward()

    def gather_gradients(self, loss: Tensor, max_norm: float) -> tuple[float, float]:
        """Sum loss and gradients over the processes and clip to a global norm: (loss, norm before clipping).

        loss: 0-dimensional float64, this process's part of the step. Every process gets the same two numbers, so all
        agree on whether they are finite. This is where the step waits for the device, once.
        """
        gradients = [_local(each.grad) for _, each in self._named if each.grad is not None]
        gradients = [each for each in gradients if each.numel()]
        self._sum_gradients(gradients)
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        loss, norm = self._over_processes(loss, norm.to(loss.device))
        if gradients:
            factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))
        loss_value, grad_norm = torch.stack([loss, norm.double()]).tolist()
        return loss_value, grad_norm

    @abstractmethod
    def _sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Sum over the processes what the backward passes left apart."""

    def _over_processes(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and norm of the whole step from this process's loss and the norm of the gradients it holds."""
        return sum_over_ranks(loss, "the end of a step"), norm

    @abstractmethod
    def publish(self) -> None:
        """Give the updated weights to the model that computes."""

    @abstractmethod
    def state_dict(self, model: RewardModel) -> dict[str, Tensor]:
        """The library model's state with float32 weights, for saving; a DTensor where it is cut over processes."""


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class MasterWeights(TrainedWeights):
    """float32 weights for the optimizer beside a model that computes in another type.

    With weights in bfloat16 of their own, most updates at a learning rate of 5e-7 round to nothing (the figures
    are in docs/log.md). Gradients of every micro-batch are added up in float32 here, and `publish` copies
    the weights to the model once a step. Parameters that are float32 in the model are their own masters.

    With several processes each keeps all of this, and the float32 gradients are summed once a step: torch's own
    DistributedDataParallel would sum bfloat16 gradients, and after each micro-batch.
    """

    def __init__(self, model: RewardModel, dtype: torch.dtype) -> None:
        head = set(model.head.parameters())
        self.device = next(model.parameters()).device
        self.compute_dtype = dtype
        self._named = []
        self._copies: list[tuple[nn.Parameter, nn.Parameter]] = []  # (master, parameter that computes)
        for name, parameter in model.named_parameters():
            master = parameter
            if dtype != torch.float32 and parameter not in head:
                master = nn.Parameter(parameter.detach().clone())
                parameter.data = parameter.data.to(dtype)
                parameter.register_post_accumulate_grad_hook(_adder(master))
                self._copies.append((master, parameter))
            elif dtype != torch.float32:  # as a part of the mapped weights file it would keep all of that in memory
                parameter.data = parameter.data.clone()
            self._named.append((name, master))
        self._matrices = matrix_names(model)

    def _sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        if world_size() == 1:
            return
        turn("the sum of gradients")
        for bucket in _buckets(gradients):
            flat = torch.cat([each.reshape(-1) for each in bucket])
            dist.all_reduce(flat)
            summed = flat.split([each.numel() for each in bucket])
            torch._foreach_copy_(bucket, [part.view_as(each) for part, each in zip(summed, bucket, strict=True)])

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the float32 weights into the model that computes."""
        if self._copies:
            torch._foreach_copy_([copy for _, copy in self._copies], [master for master, _ in self._copies])

    def state_dict(self, model: RewardModel) -> dict[str, Tensor]:
        """The library model's state, with float32 weights; for saving."""
        masters = dict(self._named)
        prefix = "network."
        return {name: masters.get(prefix + name, value) for name, value in model.network.state_dict().items()}


def matrix_names(model: nn.Module) -> frozenset[str]:
    """Names of the parameters with two axes or more."""
    return frozenset(name for name, parameter in model.named_parameters() if parameter.ndim >= 2)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, in runs of at most `_BUCKET` numbers; a larger one is alone."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > _BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def _adder(master: nn.Parameter):  # type: ignore[no-untyped-def]
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return add


@torch.no_grad()
def copy_from_main(model: nn.Module) -> None:
    """Overwrite weights and buffers with those of rank 0, so that folders that differ between machines do no harm."""
    if world_size() > 1:
        turn("the weights of rank 0")
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, src=0)
