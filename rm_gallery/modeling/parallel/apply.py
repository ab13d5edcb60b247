"""How the model runs: strategy, precision, activation checkpointing and fused kernels, applied from outside the model.

Of Liger only the functions are used, set into the library's modules: its own way of patching changes classes, and with
them every other model of the process.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from rm_gallery.distributed.process_group import World, from_main, turn
from rm_gallery.errors import UserError
from rm_gallery.modeling.attention import dispatch
from rm_gallery.modeling.config import DTYPE_BYTES, CheckpointingMode, FsdpConfig, ModelConfig
from rm_gallery.modeling.meta_init import WeightFiles
from rm_gallery.modeling.parallel.fsdp import Cut, shard, units
from rm_gallery.modeling.parallel.master_weights import MasterWeights, TrainedWeights, copy_from_main
from rm_gallery.modeling.parallel.strategy import Strategy, choose_strategy
from rm_gallery.modeling.reward_model import RewardModel

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve_strategy(config: ModelConfig, world: World, num_parameters: int) -> Strategy:
    """The strategy that runs on this world: `choose_strategy` with the facts of this process.

    Every process must call it, since rank 0 measures the memory. Raises UserError for group sizes and offloading that
    do not fit.
    """
    fsdp = config.fsdp_config
    strategy = choose_strategy(
        config.strategy,
        world_size=world.world_size,
        memory=from_main(_memory_of_a_process(world)),
        num_parameters=num_parameters,
        dtype_bytes=DTYPE_BYTES[fsdp.model_dtype],
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
        log.info("model.fsdp_config.fsdp_size=1: groups of one process cut nothing, so each keeps all weights (ddp)")
    if strategy == "ddp" and fsdp.offloads_weights:
        log.info("model.fsdp_config: %s", _IN_HOST_MEMORY)
    return strategy


_IN_HOST_MEMORY = "offloading does nothing on a CPU, where all is in host memory already"


def _memory_of_a_process(world: World) -> int:
    """Bytes."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world.local_world_size


def apply(
    model: RewardModel, config: ModelConfig, world: World, *, strategy: Strategy, files: WeightFiles | None = None
) -> tuple[RewardModel, TrainedWeights]:
    """Set up kernels, activation checkpointing, precision and strategy: the model to call, and its weights.

    files: for a model without weights, where they lie; the strategy cuts them then.
    """
    fsdp = config.fsdp_config
    dtype = DTYPES[fsdp.model_dtype]
    dispatch.check(config.attention, world.device, dtype, config.dropout)
    model.attention = config.attention
    if model.padded and config.attention != "auto":
        log.info("model.attention=%s does nothing for an encoder, whose attention is the library's", config.attention)
    if config.use_liger and config.compile:
        log.info(
            "model.use_liger does nothing with model.compile=true: compiled layers fuse these operations themselves"
        )
    elif config.use_liger:
        use_liger(model.network, world.device)
    if config.enable_gradient_checkpointing:
        enable_checkpointing(model, config.checkpointing_mode)
    elif config.checkpointing_mode != "full":
        log.info("model.checkpointing_mode does nothing without model.enable_gradient_checkpointing=true")
    if config.compile:
        _compile(model)
    weights: TrainedWeights
    if strategy in ("fsdp", "fsdp2"):
        model, weights = shard(model, files, _cut(strategy, fsdp, dtype, world), world)
    else:
        assert files is None, f"{strategy} keeps all weights in each process"
        if strategy == "none":
            _say_what_one_process_ignores(config, world)
        elif fsdp.wrap_policy.min_num_params:
            log.info("model.fsdp_config.wrap_policy does nothing with ddp")
        model.to(world.device)
        copy_from_main(model)
        weights = MasterWeights(model, dtype)
    if world.world_size > 1:
        model.register_forward_pre_hook(lambda *_: turn("a forward pass"), prepend=True)
    return model, weights


def _cut(strategy: Literal["fsdp", "fsdp2"], fsdp: FsdpConfig, dtype: torch.dtype, world: World) -> Cut:
    offload = fsdp.offloads_weights
    if world.device.type == "cpu" and (offload or fsdp.optimizer_offload):
        log.info("model.fsdp_config: %s", _IN_HOST_MEMORY)
        offload = offload and strategy == "fsdp2"  # FSDP1 refuses it there; fsdp2 runs the same code as on a GPU
    size = fsdp.fsdp_size if fsdp.fsdp_size > 0 else world.world_size
    return Cut(strategy, dtype, size, fsdp.wrap_policy.min_num_params, offload)


def _say_what_one_process_ignores(config: ModelConfig, world: World) -> None:
    fsdp = config.fsdp_config
    if world.device.type == "cpu" and (fsdp.offloads_weights or fsdp.optimizer_offload):
        log.info("model.fsdp_config: %s", _IN_HOST_MEMORY)
    if config.strategy != "auto":
        log.info("model.strategy=%s: one process, so the model is not split", config.strategy)
    if fsdp.fsdp_size > 1 or fsdp.wrap_policy.min_num_params:
        log.info("model.fsdp_config.fsdp_size and wrap_policy do nothing in one process")


def offload_optimizer(optimizer: torch.optim.Optimizer, config: FsdpConfig, device: torch.device) -> None:
    """Keep the optimizer's state in host memory between its steps, where the configuration asks for that alone."""
    if not config.optimizer_offload or config.offloads_weights or device.type == "cpu":
        return

    def move(to: torch.device | str) -> None:
        for state in optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.ndim:  # the count of steps stays where the kernel wants it
                    state[name] = value.to(to)

    optimizer.register_step_pre_hook(lambda *_: move(device))
    optimizer.register_step_post_hook(lambda *_: move("cpu"))


def _compile(model: RewardModel) -> None:
    """Compile each layer by itself, for any number of tokens; attention, which has kernels of its own, stays out."""
    layers = units(model, 0)
    for layer in layers:
        if hasattr(layer, "self_attn"):
            layer.self_attn.attend = torch.compiler.disable(dispatch.attend)  # type: ignore[union-attr]
        layer.compile(dynamic=True)
    log.info("model.compile: %d layers, each at its first micro-batch", len(layers))


_KEPT = (
    "aten::mm", "aten::addmm",
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_flash_attention_forward", "torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward",
)  # fmt: skip
"""What `selective` keeps: the outputs of weight matrices and of fused attention."""


def enable_checkpointing(model: RewardModel, mode: CheckpointingMode) -> None:
    """`full` keeps each layer's input alone; `selective` also what takes long to compute, and recomputes the rest.

    Plain attention on a CPU, which is made of products of its own, is computed again either way.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    if hasattr(model.network, "activation_checkpointing_enable"):
        model.network.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # its older name
        model.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _policy(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    is_flex = operation is torch.ops.higher_order.flex_attention
    name = operation.name().partition(".")[0] if isinstance(operation, torch._ops.OpOverload) else ""
    return CheckpointPolicy.MUST_SAVE if is_flex or name in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def use_liger(network: nn.Module, device: torch.device) -> None:
    """Norms and gated MLPs of a decoder by Liger's kernels; on a CPU, where they do not run, one line says so.

    Raises UserError when the package is missing.
    """
    if device.type != "cuda":
        log.info("model.use_liger does nothing on a CPU: Liger's kernels need a GPU")
        return
    try:
        from liger_kernel.transformers import functional  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise UserError(
            "model.use_liger=true needs the liger-kernel package: pip install 'rm-gallery[liger]'"
        ) from error
    count = set_in(network, functional)
    if not count:
        log.info("model.use_liger does nothing for %s: it has no RMS norms or gated MLPs", type(network).__name__)


def set_in(network: nn.Module, kernels: Any) -> int:
    """Give modules that `kernels` has a function for a `forward` that calls it; returns how many."""
    config: Any = network.config
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    gated = {"silu": kernels.liger_swiglu, "gelu_pytorch_tanh": kernels.liger_geglu}.get(str(activation))

    def norm(module: Any, hidden_states: Tensor) -> Tensor:
        out: Tensor = kernels.liger_rms_norm(
            hidden_states, module.weight, module.variance_epsilon, 0.0, "llama", in_place=False
        )
        return out

    def gemma_norm(module: Any, hidden_states: Tensor) -> Tensor:  # times 1 + weight, and rounded after that
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
            module.forward = MethodType(norm if hasattr(module, "variance_epsilon") else gemma_norm, module)
        elif name.endswith("MLP") and hasattr(module, "gate_proj") and gated is not None:
            module.forward = MethodType(mlp, module)
        else:
            continue
        count += 1
    return count
