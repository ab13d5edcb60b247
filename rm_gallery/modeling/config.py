"""The `model` section of the configuration: model, kernels, precision and parallelism. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge, Gt, Lt

AttentionKernel: TypeAlias = Literal["auto", "plain", "sdpa", "varlen", "flex"]
CheckpointingMode: TypeAlias = Literal["full", "selective"]
PackingSetting: TypeAlias = Literal["auto", "packed", "padded"]
StrategySetting: TypeAlias = Literal["auto", "fsdp", "fsdp2", "ddp"]
FreezeSetting: TypeAlias = Literal["backbone", "embeddings"] | Annotated[int, Ge(1)] | None
HeadInit: TypeAlias = Literal["normal", "zero", "lm_head_difference"]
Quantization: TypeAlias = Literal["nf4", "int8"] | None
ModelDtype: TypeAlias = Literal["auto", "bf16", "fp32"]
MasterWeightsSetting: TypeAlias = Literal["fp32", "bf16_stochastic"]

ALL_LINEAR: Literal["all-linear"] = "all-linear"

DTYPE_BYTES: dict[str, int] = {"fp32": 4, "bf16": 2}
"""Bytes per element of each `model.fsdp_config.model_dtype`."""


@dataclass(frozen=True)
class WrapPolicyConfig:
    """`model.fsdp_config.wrap_policy`: the modules that FSDP2 wraps."""

    __pydantic_config__ = {"extra": "forbid"}

    min_num_params: Annotated[int, Ge(0)] = 0
    """Wrap modules with at least this many parameters; 0 wraps each transformer layer."""


@dataclass(frozen=True)
class FsdpConfig:
    """`model.fsdp_config`: precision, sharding and offload."""

    __pydantic_config__ = {"extra": "forbid"}

    model_dtype: ModelDtype = "auto"
    """Compute dtype of the backbone; `auto` is bf16 on GPUs and CPUs with bfloat16 instructions, else fp32. Master
    weights and optimizer state are float32 either way."""
    master_weights: MasterWeightsSetting = "fp32"
    """Dtype of the weights that the optimizer updates. `bf16_stochastic` keeps the backbone's trained weights in bf16
    only, 4 bytes less per parameter: updates are computed in float32 and rounded stochastically; `auto` above is bf16
    then. See docs/optimizers.md."""
    cpu_offload: bool = False
    """FSDP2: offload parameters, gradients and optimizer state to host memory, where the optimizer steps too."""
    offload_params: bool = False
    """Alias of `cpu_offload` (FSDP1's name): FSDP2 offloads parameters only with gradients and optimizer state."""
    param_offload: bool = False
    """Alias of `cpu_offload` (verl's name)."""
    optimizer_offload: bool = False
    """Offload only the optimizer state to host memory, between steps. Works with any strategy and on one GPU."""
    fsdp_size: Annotated[int, Ge(-1)] = -1
    """Ranks per sharding group, typically the GPUs of one node: parameters are sharded within a group and replicated
    across groups (hybrid sharding). -1: one group of all ranks."""
    wrap_policy: WrapPolicyConfig = field(default_factory=WrapPolicyConfig)

    @property
    def offloads_weights(self) -> bool:
        """Whether parameters, gradients and optimizer state are offloaded to host memory."""
        return self.cpu_offload or self.offload_params or self.param_offload


@dataclass(frozen=True)
class LoraConfig:
    """`model.lora`: train low-rank matrices and the reward head, with all other weights frozen (extra `lora`)."""

    __pydantic_config__ = {"extra": "forbid"}

    rank: Annotated[int, Ge(0)] = 0
    """Rank of the matrices; 0 trains all weights, without LoRA."""
    alpha: Annotated[float, Gt(0)] = 16.0
    """The matrices' product is scaled by alpha / rank."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout of the input of the matrices."""
    target_modules: Literal["all-linear"] | list[str] = ALL_LINEAR
    """Linear layers with LoRA: all of the backbone, or a list of names such as `[q_proj, v_proj]`."""
    use_dora: bool = False
    """DoRA: train the magnitude of each weight's columns separately (Liu et al. 2024)."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023)."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules that are trained in full and saved, beside the reward head: embeddings and norms, by the ends of their
    names, such as `[embed_tokens, input_layernorm, norm]`; of a language model (`sft`) also `lm_head`."""
    base: str | None = None
    """Folder or hub name of the base model, when `partial_pretrain` is an adapter whose folder names another path."""


@dataclass(frozen=True)
class ModelConfig:
    """`model`: model, kernels, precision and parallelism."""

    __pydantic_config__ = {"extra": "forbid"}

    partial_pretrain: str = ""
    """Folder or hub name of the model to start from: a base model, a chat model, or a reward model."""
    new_head: bool = False
    """Train a newly initialized reward head, and replace the head of the folder if it has one. Without it, a head that
    is missing in a reward model's folder, or that cannot be run, is an error."""
    head_init: HeadInit = "normal"
    """How a new reward head starts: `normal` (random, as transformers does), `zero`, or `lm_head_difference`: the
    language model's logit of the first of `head_init_words` minus that of the second."""
    head_init_words: tuple[str, str] = ("Yes", "No")
    """Words of `lm_head_difference`; each must be one token."""
    attributes: list[str] = field(default_factory=list)
    """With `objective.name=attributes`: names of the outputs of the reward head, each trained on the numbers of its
    column, e.g. `[helpfulness, correctness, coherence]`. Empty: one reward."""
    attribute_weights: dict[str, float] = field(default_factory=dict)
    """The reward of a response is the sum of its attributes times these weights, 0 for names without one; by default it
    is the first attribute. `score --weights` sets others."""
    heads: Annotated[int, Ge(1)] = 1
    """Reward heads on the model, trained together from other random values; the reward is their mean."""
    freeze: FreezeSetting = None
    """Parameters that are not trained: `backbone` trains the reward head (and pooler) alone, `embeddings` everything
    else, and a number freezes the embeddings and this many of the lowest layers. Null trains all."""
    resize_embeddings: bool = False
    """Add randomly initialized embedding rows for tokens of the tokenizer that have none, and train them. Without it
    such a tokenizer is an error."""
    trust_remote_code: bool = False
    """Run Python code from the model folder."""
    enable_gradient_checkpointing: bool = False
    """Activation checkpointing: recompute activations in the backward pass instead of storing them."""
    checkpointing_mode: CheckpointingMode = "full"
    """With `enable_gradient_checkpointing`: `full` saves only each layer's input; `selective` also saves the outputs of
    linear layers and fused attention, which recomputes little."""
    attention: AttentionKernel = "auto"
    """Attention kernel of decoders: `plain` (matrix products), `sdpa` (PyTorch), or on GPUs `varlen` (FlashAttention,
    bf16) and `flex` (FlexAttention). `auto`: on a CPU plain or sdpa, by length and dtype; on a GPU the first of varlen,
    flex and sdpa that supports the model."""
    packing: PackingSetting = "auto"
    """How texts are batched: `packed` (no padding, shared prompts computed once) or `padded`. `auto`: packed where
    rewards equal those of one text at a time, else padded where they do; see docs/models.md."""
    use_liger: bool = False
    """Run norms and gated MLPs with Liger's GPU kernels (extra `liger`). No effect on a CPU or with `compile`."""
    compile: bool = False
    """Compile each layer with torch.compile. The first steps are slow; little gain on a CPU."""
    strategy: StrategySetting = "auto"
    """Parallelism over several ranks: `ddp` replicates the model, `fsdp2` shards it (`fully_shard`); `fsdp` is an alias
    of `fsdp2`. `auto`: `ddp` if weights, gradients and optimizer state take at most a quarter of a rank's memory, else
    `fsdp2`. One process uses neither."""
    dropout: float = 0.0
    """Every dropout probability of the model. Off by default: noise in rewards costs more than it regularizes."""
    router_aux_loss_coef: Annotated[float, Ge(0)] | None = None
    """Mixtures of experts: weight of the routers' load-balancing loss, which is added to the loss; 0.001 in
    many configurations. Null or 0: none."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    quantization: Quantization = None
    """QLoRA, with `lora.rank` (extra `qlora`): the frozen linear layers in 4 bits (`nf4`, Dettmers et al. 2023) or 8
    bits (`int8`). Head, norms and embeddings are not quantized."""
    fsdp_config: FsdpConfig = field(default_factory=FsdpConfig)

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs of the reward head: its attributes, or `head_1`, ... of several heads; [] for one."""
        return self.attributes or (head_names(self.heads) if self.heads > 1 else [])

    @property
    def output_weights(self) -> tuple[float, ...]:
        """The weight of each output in the reward."""
        if self.heads > 1:
            return (1 / self.heads,) * self.heads
        return weights_of(self.attributes, self.attribute_weights)


def head_names(count: int) -> list[str]:
    """Names of the outputs of several heads."""
    return [f"head_{number}" for number in range(1, count + 1)]


def weights_of(attributes: Sequence[str], weights: Mapping[str, float]) -> tuple[float, ...]:
    """The weight of each attribute in the reward; 1 for the first and 0 for others if there are no weights."""
    chosen = weights or dict.fromkeys(attributes[:1], 1.0)
    return tuple(float(chosen.get(name, 0.0)) for name in attributes)


def with_dtype(config: ModelConfig, *, has_bf16: bool) -> ModelConfig:
    """The configuration with `auto` as `model_dtype` resolved. has_bf16: whether the device has units for bfloat16."""
    if config.fsdp_config.model_dtype != "auto":
        return config
    dtype: ModelDtype = "bf16" if has_bf16 or config.fsdp_config.master_weights == "bf16_stochastic" else "fp32"
    return replace(config, fsdp_config=replace(config.fsdp_config, model_dtype=dtype))
