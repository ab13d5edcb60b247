"""Muon and Adafactor, of PyTorch for replicated parameters, for those that FSDP2 shards too (DTensors of rows)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rm_gallery.training.config import OptimConfig


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the matrices of layers, AdamW for embeddings, heads, norms, biases and experts.

    One momentum buffer for each matrix, whose update is orthogonalized. Updates are scaled to the size of AdamW's
    (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2), so that `optim.lr` means the same.
    """

    def __init__(
        self, named_parameters: Sequence[tuple[str, nn.Parameter]], config: OptimConfig,
        more: Sequence[dict[str, Any]] = (),
    ) -> None:  # fmt: skip
        """more: further parameter groups, for AdamW."""
        matrices = [parameter for name, parameter in named_parameters if is_layer_matrix(name, parameter)]
        chosen = set(matrices)
        rest = groups_of([each for _, each in named_parameters if each not in chosen], config.weight_decay)
        rest += more
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(_MatrixMuon(
                matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
            ))  # fmt: skip
        if rest:
            self._parts.append(torch.optim.AdamW(rest, lr=config.lr, betas=config.betas, eps=config.eps, fused=True))
        super().__init__(
            [{"params": [each for part in self._parts for g in part.param_groups for each in g["params"]]}], {}
        )
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step both, on the groups and the state of this optimizer: loading a state replaces them."""
        start = 0
        for part in self._parts:
            end = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:end], self.state
            part.step()
            start = end


def is_layer_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates it: a matrix of a numbered layer that is no table."""
    return parameter.ndim == 2 and bool(re.search(r"\.\d+\.", name)) and "emb" not in name and "_bias" not in name


def groups_of(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups with weight decay on matrices only (Loshchilov and Hutter 2019)."""
    groups = [
        {"params": [each for each in parameters if each.ndim >= 2], "weight_decay": weight_decay},
        {"params": [each for each in parameters if each.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class _ShardedSteps(torch.optim.Optimizer):
    """Updates sharded parameters with `_step_sharded`, and leaves the others to the optimizer that follows it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if isinstance(parameter, DTensor) and parameter.grad is not None:
                    self._step_sharded(parameter, group)
        groups = self.param_groups
        self.param_groups = [
            {**group, "params": [each for each in group["params"] if not isinstance(each, DTensor)]}
            for group in groups
        ]  # fmt: skip
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _step_sharded(self, parameter: DTensor, group: dict[str, Any]) -> None:
        raise AssertionError("defined by each optimizer")


class _MatrixMuon(_ShardedSteps, torch.optim.Muon):
    """torch.optim.Muon, which updates sharded matrices too.

    A sharded matrix has its momentum sharded likewise. Its update is all-gathered in bfloat16, in which Muon
    orthogonalizes, so every rank orthogonalizes the whole matrix, and its result is that of one process.
    """

    def _step_sharded(self, parameter: DTensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        gradient, momentum = local(parameter.grad), local(state["momentum_buffer"])
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        # Muon without momentum, on a matrix of zeros: it becomes the scaled, orthogonalized update.
        whole = nn.Parameter(torch.zeros(parameter.shape, device=parameter.device))
        whole.grad_dtype = None
        whole.grad = sharded_like(parameter, update.bfloat16()).full_tensor()
        torch.optim.Muon([whole], lr=group["lr"], weight_decay=0, momentum=0, nesterov=False,
                         adjust_lr_fn=group["adjust_lr_fn"]).step()  # fmt: skip
        shard = DTensor.from_local(whole.detach(), parameter.device_mesh, run_check=False)
        values = local(parameter)
        values.mul_(1 - group["lr"] * group["weight_decay"])
        values.add_(local(shard.redistribute(placements=parameter.placements)))


class Adafactor(_ShardedSteps, torch.optim.Adafactor):
    """torch.optim.Adafactor, which updates sharded parameters too.

    A rank has the row means of its rows, and every rank the column means; sums over rows are reduced over ranks. No
    tensor is gathered.
    """

    def _step_sharded(self, parameter: DTensor, group: dict[str, Any]) -> None:
        state, gradient, values = self.state[parameter], local(parameter.grad), local(parameter)
        if not state:
            state["step"] = torch.zeros(())
            if parameter.ndim > 1:
                state["row_var"] = sharded_like(parameter, gradient.new_zeros((*gradient.shape[:-1], 1)))
                columns = gradient.new_zeros((*gradient.shape[:-2], 1, gradient.shape[-1]))
                # Of experts in one tensor, the rows that are averaged are all on one rank.
                state["col_var"] = columns if parameter.ndim == 2 else sharded_like(parameter, columns)
            else:
                state["variance"] = torch.zeros_like(parameter)
        state["step"] += 1
        step = state["step"].item()
        keep = step ** group["beta2_decay"]  # 1 - beta2
        floor, (eps, scale_floor) = torch.finfo(torch.float32).eps, group["eps"]
        floor = floor if eps is None else eps
        size = parameter.numel()
        norm = _norm(parameter, values) / math.sqrt(size)
        rate = norm.clamp(min=scale_floor) * min(group["lr"], 1 / math.sqrt(step))
        values.mul_(1 - group["lr"] * group["weight_decay"])
        if parameter.ndim > 1:
            row_var, col_var = local(state["row_var"]), local(state["col_var"])
            rows, columns = (torch.linalg.vector_norm(gradient, dim=d, keepdim=True).square_() for d in (-1, -2))
            row_var.lerp_(rows / parameter.shape[-1], keep)
            total = row_var.sum(-2, keepdim=True)
            if parameter.ndim == 2:
                columns, total = sum_over_shards(parameter, columns), sum_over_shards(parameter, total)
            col_var.lerp_(columns / parameter.shape[-2], keep)
            variance = (row_var @ col_var).div_((total / parameter.shape[-2]).clamp_(min=floor))
        else:
            variance = local(state["variance"]).lerp_(gradient.square(), keep).clone()
        update = variance.clamp_(min=floor * floor).rsqrt_().mul_(gradient)
        size_of_update = _norm(parameter, update) / (math.sqrt(size) * group["d"])
        values.sub_(update.mul_(rate / size_of_update.clamp(min=1.0)))


def local(tensor: Tensor | None) -> Tensor:
    """The tensor, or this rank's shard of it."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(parameter: DTensor, shard: Tensor) -> DTensor:
    """A tensor whose rows are on the ranks of those of `parameter`; its other dimensions are those of `shard`."""
    shape = torch.Size([parameter.shape[0], *shard.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = parameter.device_mesh, parameter.placements
    whole = DTensor.from_local(shard, mesh, placements, run_check=False, shape=shape, stride=stride)
    return cast(DTensor, whole.to(shard.device))  # from_local moves an offloaded one to the mesh's device


def sum_over_shards(parameter: DTensor, summand: Tensor) -> Tensor:
    """The sum over the ranks that have different rows of `parameter`."""
    for dimension, placement in enumerate(parameter.placements):
        if placement.is_shard():
            assert placement.is_shard(0), "FSDP2 shards rows"
            dist.all_reduce(summand, group=parameter.device_mesh.get_group(dimension))
    return summand


def _norm(parameter: DTensor, shard: Tensor) -> Tensor:
    return sum_over_shards(parameter, torch.linalg.vector_norm(shard).square_()).sqrt_()
