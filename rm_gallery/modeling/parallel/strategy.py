"""The choice between DDP and FSDP2: a pure function, the same for training and for an estimate. Loads no torch."""

from __future__ import annotations

from typing import Literal, TypeAlias

from rm_gallery.errors import UserError
from rm_gallery.modeling.config import StrategySetting

Strategy: TypeAlias = Literal["none", "ddp", "fsdp2"]
"""What runs; `none` is one process that holds everything on its device."""

_DDP_MEMORY_SHARE = 0.25
"""`auto` keeps DDP while the training state takes at most this share of a process's memory: the rest is activations."""


def training_state_bytes(num_parameters: int, dtype_bytes: int) -> int:
    """Bytes of an unsharded training state: weights, gradients and AdamW's two moments in float32, 16 a parameter.

    A compute type narrower than float32 adds its copy of the weights, `dtype_bytes` a parameter: 18 with bf16.
    """
    return num_parameters * (16 + (dtype_bytes if dtype_bytes < 4 else 0))


def choose_strategy(
    setting: StrategySetting, *, world_size: int, memory: float, num_parameters: int, dtype_bytes: int, offload: bool,
    fsdp_size: int, on_gpu: bool,
) -> Strategy:  # fmt: skip
    """The strategy that runs under `model.strategy`; the arguments are facts about the run, so it is pure.

    memory: bytes of one process's device (a GPU's total, or its share of the host's). num_parameters: of the whole
    model. dtype_bytes: of a number in the compute type. offload: weights are offloaded to host memory. fsdp_size: ranks
    of a sharding group; -1 for all.

    Example: 7e9 parameters in bf16 need 7e9 * 18 = 126 GB; a quarter of an 80 GB GPU is 20 GB, so `auto` is FSDP2.
    Raises UserError for a group size that does not divide the world size, and for DDP with offloaded weights on GPUs.
    """
    if world_size == 1:
        return "fsdp2" if on_gpu and offload else "none"
    strategy: Strategy
    if setting == "auto":
        is_small = training_state_bytes(num_parameters, dtype_bytes) <= _DDP_MEMORY_SHARE * memory and not offload
        strategy = "ddp" if is_small else "fsdp2"
    else:
        strategy = "ddp" if setting == "ddp" else "fsdp2"  # `fsdp` is an alias
    if strategy != "ddp" and fsdp_size > 0 and world_size % fsdp_size:
        raise UserError(
            f"model.fsdp_config.fsdp_size={fsdp_size} does not divide the {world_size} processes into equal groups; "
            "set a divisor, or -1 for one group"
        )
    if strategy != "ddp" and fsdp_size == 1:  # a group of one rank shards nothing
        strategy = "ddp"
    if strategy == "ddp" and offload and on_gpu:
        raise UserError(
            "model.strategy=ddp cannot offload weights; set fsdp2, or cpu_offload=false (optimizer_offload can)"
        )
    return strategy
