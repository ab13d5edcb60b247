"""Choice between DDP and FSDP2: a pure function that training and `rm-gallery estimate` share. Loads no torch."""

from __future__ import annotations

from typing import Literal, TypeAlias

from rm_gallery.errors import UserError
from rm_gallery.modeling.config import StrategySetting

Strategy: TypeAlias = Literal["none", "ddp", "fsdp2"]
"""Strategy that runs; `none` is a single process without sharding."""

_DDP_MEMORY_SHARE = 0.25
"""`auto` is DDP if the training state takes at most this share of a rank's memory; activations need the rest."""


def optimizer_state_bytes(optimizer: str, num_trained: float, num_matrix: float) -> float:
    """Bytes of the state of `optim.name`, unsharded.

    num_matrix: trained parameters in matrices of layers, of which Muon has one moment instead of two. With 8 bits there
    is a float32 scale per 256 numbers. Adafactor's row and column of each matrix are not counted.
    """
    per_moment = 1 + 4 / 256 if optimizer == "adamw_8bit" else 4
    numbers = 2 * num_trained - (num_matrix if optimizer == "muon" else 0)
    return 0 if optimizer == "adafactor" else per_moment * numbers


def training_state_bytes(
    num_parameters: int, dtype_bytes: int, num_trained: int | None = None, *, optimizer: str = "adamw",
    num_matrix: int = 0, has_masters: bool = True, has_ema: bool = False,
) -> float:  # fmt: skip
    """Bytes of an unsharded training state, with a float32 average of the trained weights if `has_ema`.

    16 per parameter with AdamW: weights, gradients and two moments in float32. A compute dtype narrower than float32
    adds a copy of the weights, `dtype_bytes` per parameter: 18 with bf16. Without master weights there is only the
    copy: 14. Of frozen parameters (all but `num_trained`) there are only weights in the compute dtype.
    """
    trained = num_parameters if num_trained is None else num_trained
    copies = dtype_bytes if dtype_bytes < 4 else 0
    weights = 4 + copies if has_masters else dtype_bytes
    state = optimizer_state_bytes(optimizer, trained, min(num_matrix, trained))
    state += 4 * trained if has_ema else 0
    return trained * (weights + 4) + state + (num_parameters - trained) * dtype_bytes


def choose_strategy(
    setting: StrategySetting, *, world_size: int, memory: float, state_bytes: float, offload: bool, fsdp_size: int,
    on_gpu: bool,
) -> Strategy:  # fmt: skip
    """Return the strategy for a `model.strategy` setting.

    memory: bytes of one rank's device (total memory of a GPU, or its share of the host's). state_bytes: see
    `training_state_bytes`. offload: parameters are offloaded to host memory. fsdp_size: ranks per sharding group; -1
    for all ranks.

    Example: 7e9 parameters in bf16 with AdamW need 7e9 * 18 = 126 GB; a quarter of an 80 GB GPU is 20 GB, so `auto` is
    FSDP2.
    Raises UserError for a group size that does not divide the world size, and for DDP with parameter offload on GPUs.
    """
    if world_size == 1:
        return "fsdp2" if on_gpu and offload else "none"
    strategy: Strategy
    if setting == "auto":
        is_small = state_bytes <= _DDP_MEMORY_SHARE * memory and not offload
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
