"""Applies `model` settings to a reward model: strategy, precision, activation checkpointing, compile, Liger kernels."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from rm_gallery.distributed.collectives import broadcast
from rm_gallery.distributed.process_group import World, heartbeat
from rm_gallery.errors import UserError
from rm_gallery.modeling.architectures import architecture
from rm_gallery.modeling.attention import dispatch
from rm_gallery.modeling.config import DTYPE_BYTES, CheckpointingMode, FsdpConfig, ModelConfig
from rm_gallery.modeling.meta_init import WeightFiles
from rm_gallery.modeling.parallel.fsdp import ShardingSpec, shard, transformer_layers
from rm_gallery.modeling.parallel.master_weights import MasterWeights, TrainedWeights, broadcast_from_rank_0
from rm_gallery.modeling.parallel.strategy import Strategy, choose_strategy, training_state_bytes
from rm_gallery.modeling.reward_model import RewardModel

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_NO_OFFLOAD_ON_CPU = "offloading has no effect on a CPU: everything is in host memory already"


def resolve_strategy(
    config: ModelConfig, world: World, num_parameters: int, num_trained: int | None = None, *,
    optimizer: str = "adamw", num_matrix: int = 0, has_ema: bool = False,
) -> Strategy:  # fmt: skip
    """Call `choose_strategy` with the settings and the hardware of this run, and log the choice.

    num_parameters: of the whole model; num_trained: of its trained parameters, all by default; optimizer, num_matrix,
    has_ema: see `training_state_bytes`. A collective, since rank 0 measures the memory. Raises UserError as
    `choose_strategy` does.
    """
    fsdp = config.fsdp_config
    strategy = choose_strategy(
        config.strategy,
        world_size=world.world_size,
        memory=broadcast(_memory_per_process(world)),
        state_bytes=training_state_bytes(
            num_parameters,
            DTYPE_BYTES[fsdp.model_dtype],
            num_trained,
            optimizer=optimizer,
            num_matrix=num_matrix,
            has_masters=fsdp.master_weights == "fp32",
            has_ema=has_ema,
        ),
        offload=fsdp.offloads_weights,
        fsdp_size=fsdp.fsdp_size,
        on_gpu=world.device.type == "cuda",
    )
    if world.world_size == 1:
        return strategy
    if config.strategy == "auto":
        log.info(
            "model.strategy=auto: %s for %d parameters on %d processes", strategy, num_parameters, world.world_size
        )
    elif strategy == "ddp" != config.strategy:
        log.info("model.fsdp_config.fsdp_size=1: a group of one rank shards nothing, so DDP runs instead")
    elif config.strategy == "fsdp":
        log.info("model.strategy=fsdp runs FSDP2 (fully_shard): FSDP1 is deprecated in PyTorch")
    if strategy == "ddp" and fsdp.offloads_weights:
        log.info("model.fsdp_config: %s", _NO_OFFLOAD_ON_CPU)
    return strategy


def _memory_per_process(world: World) -> int:
    """Bytes: total memory of this rank's GPU, or its equal share of the host's memory."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world.local_world_size


def apply(
    model: RewardModel, config: ModelConfig, world: World, *, strategy: Strategy, files: WeightFiles | None = None
) -> TrainedWeights:
    """Set up the model in place: kernels, activation checkpointing, torch.compile, precision and strategy.

    files: for a model on the meta device, the files from which each rank loads its shards.
    Returns the weights that the optimizer updates. Raises UserError for an attention kernel that cannot train on this
    device or dtype, and for a missing package.
    """
    fsdp = config.fsdp_config
    dtype = DTYPES[fsdp.model_dtype]
    dispatch.check(config.attention, world.device, dtype, config.dropout)
    model.attention = config.attention
    if model.padded and config.attention != "auto":
        log.info("model.attention=%s has no effect on padded texts: they run transformers' attention", config.attention)
    if config.use_liger and config.compile:
        log.info("model.use_liger has no effect with model.compile=true: compiled layers fuse the same operations")
    elif config.use_liger:
        use_liger(model.network, world.device)
    if config.enable_gradient_checkpointing:
        enable_checkpointing(model, config.checkpointing_mode)
    elif config.checkpointing_mode != "full":
        log.info("model.checkpointing_mode has no effect without model.enable_gradient_checkpointing=true")
    if config.compile:
        _compile(model)
    weights: TrainedWeights
    if strategy == "fsdp2":
        weights = shard(model, files, _sharding_spec(fsdp, dtype, world), world)
    else:
        assert files is None, f"{strategy} replicates the model, so it is not on the meta device"
        if strategy == "none":
            _log_ignored_settings(config, world)
        elif fsdp.wrap_policy.min_num_params:
            log.info("model.fsdp_config.wrap_policy has no effect with DDP")
        model.to(world.device)
        broadcast_from_rank_0(model)
        weights = MasterWeights(model, dtype, has_masters=fsdp.master_weights == "fp32")
    if world.world_size > 1:
        model.register_forward_pre_hook(lambda *_: heartbeat("a forward pass"), prepend=True)
    return weights


def _sharding_spec(fsdp: FsdpConfig, dtype: torch.dtype, world: World) -> ShardingSpec:
    if world.device.type == "cpu" and (fsdp.offloads_weights or fsdp.optimizer_offload):
        log.info("model.fsdp_config: %s", _NO_OFFLOAD_ON_CPU)  # FSDP2 runs the same code as on a GPU
    size = fsdp.fsdp_size if fsdp.fsdp_size > 0 else world.world_size
    return ShardingSpec(
        dtype, size, fsdp.wrap_policy.min_num_params, fsdp.master_weights == "fp32", fsdp.offloads_weights
    )


def _log_ignored_settings(config: ModelConfig, world: World) -> None:
    """Log the settings that have no effect in one process."""
    fsdp = config.fsdp_config
    if world.device.type == "cpu" and (fsdp.offloads_weights or fsdp.optimizer_offload):
        log.info("model.fsdp_config: %s", _NO_OFFLOAD_ON_CPU)
    if config.strategy != "auto":
        log.info("model.strategy=%s has no effect in one process", config.strategy)
    if fsdp.fsdp_size > 1 or fsdp.wrap_policy.min_num_params:
        log.info("model.fsdp_config.fsdp_size and wrap_policy have no effect in one process")


def offload_optimizer(optimizer: torch.optim.Optimizer, config: FsdpConfig, device: torch.device) -> None:
    """Keep the optimizer state in host memory between steps, if `optimizer_offload` alone is set."""
    if not config.optimizer_offload or config.offloads_weights or device.type == "cpu":
        return

    def move(to: torch.device | str) -> None:
        for state in optimizer.state.values():
            for name, value in state.items():
                if (
                    isinstance(value, torch.Tensor) and value.ndim
                ):  # not the 0-dimensional step count, which fused AdamW keeps on the GPU
                    state[name] = value.to(to)

    optimizer.register_step_pre_hook(lambda *_: move(device))
    optimizer.register_step_post_hook(lambda *_: move("cpu"))


def _compile(model: RewardModel) -> None:
    """Compile each layer with dynamic shapes. Attention has its own kernels and is excluded."""
    layers = transformer_layers(model)
    for layer in layers:
        if hasattr(layer, "self_attn"):
            layer.self_attn.attend = torch.compiler.disable(dispatch.attend)  # type: ignore[union-attr]
        layer.compile(dynamic=True)
    log.info("model.compile: %d layers, each compiled at its first micro-batch", len(layers))


_SAVED_OPERATIONS = (
    "aten::mm", "aten::addmm",
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_flash_attention_forward", "torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward",
)  # fmt: skip
"""Operations whose outputs selective activation checkpointing saves: linear layers and fused attention."""


def enable_checkpointing(model: RewardModel, mode: CheckpointingMode) -> None:
    """Activation checkpointing of each layer.

    `full` saves only a layer's input and recomputes the layer in the backward pass. `selective` also saves the
    expensive outputs of `_SAVED_OPERATIONS` and recomputes the rest. Plain attention on a CPU, which consists of
    batched matrix products (`bmm`), is recomputed in both modes.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    if not getattr(model.network, "supports_gradient_checkpointing", True):
        raise UserError(
            f"model.enable_gradient_checkpointing=true: transformers does not support it for "
            f"{model.network.config.model_type}; set false"
        )
    if hasattr(model.network, "activation_checkpointing_enable"):
        model.network.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # the method's name in older versions of transformers
        model.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    for module in model.network.modules() if not model.padded else ():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = partial(_checkpoint, module._gradient_checkpointing_func)


def _checkpoint(checkpoint: Callable[..., Any], function: Callable[..., Any], *inputs: Any) -> Any:
    """Activation checkpointing whose recomputation has the layout of the forward pass.

    The recomputation runs in the backward pass, on a GPU in a thread of its own, where context variables are not set.
    """
    layout = dispatch.carried_layout()

    def compute(*inputs: Any) -> Any:
        with dispatch.carry_layout(layout):
            return function(*inputs)

    return checkpoint(compute, *inputs)


def _policy(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    is_flex = operation is torch.ops.higher_order.flex_attention
    name = operation.name().partition(".")[0] if isinstance(operation, torch._ops.OpOverload) else ""
    return CheckpointPolicy.MUST_SAVE if is_flex or name in _SAVED_OPERATIONS else CheckpointPolicy.PREFER_RECOMPUTE


def use_liger(network: nn.Module, device: torch.device) -> None:
    """Run RMS norms and gated MLPs with Liger's kernels; log if that has no effect.

    Raises UserError when the package is missing.
    """
    if device.type != "cuda":
        log.info("model.use_liger has no effect on a CPU: Liger's kernels need a GPU")
        return
    try:
        from liger_kernel.transformers import functional  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise UserError(
            "model.use_liger=true needs the liger-kernel package: pip install 'rm-gallery[liger]'"
        ) from error
    if not patch_modules(network, functional):
        log.info("model.use_liger has no effect on %s: it has no RMS norm or gated MLP", type(network).__name__)


def patch_modules(network: nn.Module, kernels: Any) -> int:
    """Replace `forward` of the modules that Liger's functions (`kernels`) support; return the number of modules.

    Patches instances, not classes: Liger's own patching would change every other model of the process.
    """
    config: Any = network.config
    is_gemma = architecture(config.model_type).float32_norms
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    gated = {"silu": kernels.liger_swiglu, "gelu_pytorch_tanh": kernels.liger_geglu}.get(str(activation))

    def norm(module: Any, hidden_states: Tensor) -> Tensor:
        out: Tensor = kernels.liger_rms_norm(
            hidden_states, module.weight, module.variance_epsilon, 0.0, "llama", in_place=False
        )
        return out

    def gemma_norm(module: Any, hidden_states: Tensor) -> Tensor:  # scales by 1 + weight, in float32
        out: Tensor = kernels.liger_rms_norm(hidden_states, module.weight, module.eps, 1.0, "gemma", in_place=False)
        return out

    def mlp(module: Any, hidden_states: Tensor) -> Tensor:
        assert gated is not None
        out: Tensor = module.down_proj(gated(module.gate_proj(hidden_states), module.up_proj(hidden_states)))
        return out

    count = 0
    for module in network.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            module.forward = MethodType(gemma_norm if is_gemma else norm, module)
        elif name.endswith("MLP") and hasattr(module, "gate_proj") and gated is not None:
            module.forward = MethodType(mlp, module)
        else:
            continue
        count += 1
    return count
