"""The `model` section of the configuration: what is trained, and how it runs. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge

AttentionKernel: TypeAlias = Literal["auto", "plain", "sdpa", "varlen", "flex"]
CheckpointingMode: TypeAlias = Literal["full", "selective"]
StrategySetting: TypeAlias = Literal["auto", "fsdp", "fsdp2", "ddp"]
ModelDtype: TypeAlias = Literal["fp32", "bf16"]

DTYPE_BYTES: dict[str, int] = {"fp32": 4, "bf16": 2}
"""Bytes of a number in each `model.fsdp_config.model_dtype`."""


@dataclass(frozen=True)
class WrapPolicyConfig:
    """`model.fsdp_config.wrap_policy`: which modules are sharded on their own."""

    __pydantic_config__ = {"extra": "forbid"}

    min_num_params: Annotated[int, Ge(0)] = 0
    """Least parameters of a module that is gathered on its own; 0 takes each transformer layer."""


@dataclass(frozen=True)
class FsdpConfig:
    """`model.fsdp_config`: precision, sharding and offload."""

    __pydantic_config__ = {"extra": "forbid"}

    model_dtype: ModelDtype = "bf16"
    """Type that the backbone computes in. The weights that the optimizer updates are float32 either way."""
    cpu_offload: bool = False
    """`fsdp` and `fsdp2`: weights, gradients and optimizer state lie in host memory, where the optimizer runs too."""
    offload_params: bool = False
    """The same; FSDP1's name. Neither engine can offload weights without their gradients and optimizer state."""
    param_offload: bool = False
    """The same; fsdp2's name."""
    optimizer_offload: bool = False
    """Only the optimizer state lies in host memory, between its steps. Any strategy, one GPU too."""
    fsdp_size: Annotated[int, Ge(-1)] = -1
    """Processes of one sharding group (on GPUs best those of one machine): weights are cut inside a group, and the
    groups hold copies of each other. -1: all processes are one group."""
    wrap_policy: WrapPolicyConfig = field(default_factory=WrapPolicyConfig)

    @property
    def offloads_weights(self) -> bool:
        """Whether weights, gradients and optimizer state lie in host memory."""
        return self.cpu_offload or self.offload_params or self.param_offload


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
    checkpointing_mode: CheckpointingMode = "full"
    """With `enable_gradient_checkpointing`: `full` keeps only each layer's input, `selective` also the outputs of
    matrix products and of fused attention, so that little is computed twice."""
    attention: AttentionKernel = "auto"
    """Attention kernel of decoders: `plain` products, torch's `sdpa`, `varlen` (flash attention, bf16) or `flex`, these
    two on GPUs. `auto`: on a CPU plain or sdpa by length and type, on a GPU the first that can: varlen, flex, sdpa."""
    use_liger: bool = False
    """Norms and gated MLPs by Liger's GPU kernels (extra `liger`); nothing on a CPU, or with `compile`."""
    compile: bool = False
    """Compile each layer with torch.compile. The first steps take long, and a CPU gains little."""
    strategy: StrategySetting = "auto"
    """How several processes share the work: `ddp` keeps all weights in each, `fsdp` (FSDP1) and `fsdp2` cut them.
    `auto`: `ddp` if weights, gradients and optimizer state take at most a quarter of a process's memory, else `fsdp2`.
    One process needs none of them."""
    dropout: float = 0.0
    """All dropout rates of the model. Off by default: noise in rewards costs more than it regularizes."""
    fsdp_config: FsdpConfig = field(default_factory=FsdpConfig)
