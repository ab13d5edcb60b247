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
    """`model.fsdp_config.wrap_policy`: which modules FSDP2 shards on their own."""

    __pydantic_config__ = {"extra": "forbid"}

    min_num_params: Annotated[int, Ge(0)] = 0
    """Smallest module, in parameters, that is sharded on its own; 0 shards each transformer layer."""


@dataclass(frozen=True)
class FsdpConfig:
    """`model.fsdp_config`: precision, sharding and offload."""

    __pydantic_config__ = {"extra": "forbid"}

    model_dtype: ModelDtype = "bf16"
    """Compute type of the backbone. Master weights and optimizer state are float32 in either case."""
    cpu_offload: bool = False
    """FSDP2: offload parameters, gradients and optimizer state to host memory, where the optimizer steps too."""
    offload_params: bool = False
    """The same under FSDP1's name; FSDP2 offloads parameters only together with gradients and optimizer state."""
    param_offload: bool = False
    """The same under verl's name."""
    optimizer_offload: bool = False
    """Offload only the optimizer state to host memory, between steps. Works with every strategy and on one GPU."""
    fsdp_size: Annotated[int, Ge(-1)] = -1
    """Ranks of one sharding group, best the GPUs of one machine: parameters are sharded inside a group and replicated
    across groups. -1: one group of all ranks."""
    wrap_policy: WrapPolicyConfig = field(default_factory=WrapPolicyConfig)

    @property
    def offloads_weights(self) -> bool:
        """Whether parameters, gradients and optimizer state are offloaded to host memory."""
        return self.cpu_offload or self.offload_params or self.param_offload


@dataclass(frozen=True)
class ModelConfig:
    """`model`: what is trained, and how it runs."""

    __pydantic_config__ = {"extra": "forbid"}

    partial_pretrain: str = ""
    """Folder or hub name of the model to start from: a base model, a chat model, or a reward model."""
    trust_remote_code: bool = False
    """Run Python code from the model folder."""
    enable_gradient_checkpointing: bool = False
    """Activation checkpointing: recompute activations in the backward pass instead of storing them."""
    checkpointing_mode: CheckpointingMode = "full"
    """With `enable_gradient_checkpointing`: `full` saves only each layer's input; `selective` also saves the outputs of
    linear layers and fused attention, so that little is recomputed."""
    attention: AttentionKernel = "auto"
    """Attention kernel of decoders: `plain` (matrix products), `sdpa` (PyTorch), or on GPUs `varlen` (FlashAttention,
    bf16) and `flex` (FlexAttention). `auto`: on a CPU plain or sdpa, by length and type; on a GPU the first of varlen,
    flex and sdpa that supports the model."""
    use_liger: bool = False
    """Run norms and gated MLPs by Liger's GPU kernels (extra `liger`); no effect on a CPU or with `compile`."""
    compile: bool = False
    """Compile each layer with torch.compile. The first steps are slow, and a CPU gains little."""
    strategy: StrategySetting = "auto"
    """Parallelism over several processes: `ddp` replicates the model, `fsdp2` shards it (`fully_shard`); `fsdp` is an
    alias of `fsdp2`. `auto`: `ddp` if weights, gradients and optimizer state take at most a quarter of a process's
    memory, else `fsdp2`. One process uses neither."""
    dropout: float = 0.0
    """All dropout rates of the model. Off by default: noise in rewards costs more than it regularizes."""
    fsdp_config: FsdpConfig = field(default_factory=FsdpConfig)
