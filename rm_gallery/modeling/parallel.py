"""How the model runs: strategy, precision and activation checkpointing, applied from outside the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from rm_gallery.distributed import World
from rm_gallery.errors import UserError
from rm_gallery.modeling.reward_model import RewardModel

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class WrapPolicyConfig:
    """`model.fsdp_config.wrap_policy`: which modules are sharded on their own."""

    __pydantic_config__ = {"extra": "forbid"}

    min_num_params: Annotated[int, Ge(0)] = 0
    """Least parameters of such a module; 0 shards each transformer layer."""


@dataclass(frozen=True)
class FsdpConfig:
    """`model.fsdp_config`: precision, sharding and offload."""

    __pydantic_config__ = {"extra": "forbid"}

    model_dtype: Literal["fp32", "bf16"] = "bf16"
    """Type that the backbone computes in. The weights that the optimizer updates are float32 either way."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in host memory."""
    offload_params: bool = False
    """With `cpu_offload`: weights too (FSDP1's name)."""
    param_offload: bool = False
    """Keep weights in host memory between uses (fsdp2)."""
    optimizer_offload: bool = False
    """Keep optimizer state in host memory (fsdp2)."""
    fsdp_size: int = -1
    """GPUs of one sharding group; -1 shards over all."""
    wrap_policy: WrapPolicyConfig = field(default_factory=WrapPolicyConfig)


@dataclass(frozen=True)
class ModelConfig:
    """`model`: what is trained, and how it runs."""

    __pydantic_config__ = {"extra": "forbid"}

    partial_pretrain: str = ""
    """Folder or hub name of the model to start from: a base model, a chat model, or a reward model."""
    trust_remote_code: bool = False
    """Run Python code that the model folder brings along."""
    enable_gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    strategy: Literal["auto", "fsdp", "fsdp2", "ddp"] = "auto"
    """How several processes share the work; one process needs none of them."""
    dropout: float = 0.0
    """All dropout rates of the model. Off by default: noise in rewards costs more than it regularizes."""
    fsdp_config: FsdpConfig = field(default_factory=FsdpConfig)


class MasterWeights:
    """float32 weights for the optimizer beside a model that computes in another type.

    With weights in bfloat16 of their own, most updates at a learning rate of 5e-7 round to nothing (the figures
    are in docs/log.md). Gradients of every micro-batch are added up in float32 here, and `publish` copies
    the weights to the model once a step. Parameters that are float32 in the model are their own masters.
    """

    def __init__(self, model: RewardModel, dtype: torch.dtype) -> None:
        head = set(model.head.parameters())
        self._named: list[tuple[str, nn.Parameter]] = []
        self._copies: list[tuple[nn.Parameter, nn.Parameter]] = []  # (master, parameter that computes)
        for name, parameter in model.named_parameters():
            master = parameter
            if dtype != torch.float32 and parameter not in head:
                master = nn.Parameter(parameter.detach().clone())
                parameter.data = parameter.data.to(dtype)
                parameter.register_post_accumulate_grad_hook(_adder(master))
                self._copies.append((master, parameter))
            self._named.append((name, master))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """float32 parameters under the model's names; their `.grad` holds the step's summed gradient."""
        return iter(self._named)

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


def _adder(master: nn.Parameter):  # type: ignore[no-untyped-def]
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return add


def apply(model: RewardModel, config: ModelConfig, world: World) -> MasterWeights:
    """Move the model to its device and set up precision and activation checkpointing.

    Raises UserError for offload on a GPU, which needs a sharding strategy that is not there yet.
    """
    fsdp = config.fsdp_config
    if fsdp.cpu_offload or fsdp.offload_params or fsdp.param_offload or fsdp.optimizer_offload:
        if world.device.type != "cpu":
            raise UserError("model.fsdp_config: offloading is not supported yet; set its *offload* keys to false")
        log.info("model.fsdp_config: offloading does nothing on a CPU, where all is in host memory already")
    if config.strategy != "auto":
        log.info("model.strategy=%s: one process, so the model is not split", config.strategy)
    if fsdp.fsdp_size > 1 or fsdp.wrap_policy.min_num_params:
        log.info("model.fsdp_config.fsdp_size and wrap_policy do nothing in one process")
    model.to(world.device)
    if config.enable_gradient_checkpointing:
        _enable_checkpointing(model)
    return MasterWeights(model, DTYPES[fsdp.model_dtype])


def _enable_checkpointing(model: RewardModel) -> None:
    options = {"use_reentrant": False}
    if hasattr(model.network, "activation_checkpointing_enable"):
        model.network.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # its older name
        model.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
