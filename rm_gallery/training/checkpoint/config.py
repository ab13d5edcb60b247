"""Settings of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge


@dataclass(frozen=True)
class CheckpointConfig:
    """Part of `trainer`: where and what to save, and where to go on from."""

    __pydantic_config__ = {"extra": "forbid"}

    default_local_dir: str = "./checkpoints/bt"
    """Run folder; `experiment_name` is appended unless it ends with it already."""
    save_freq: int = -1
    """Steps between checkpoints; one is always written at the end. 0 or less: only that one."""
    export_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the saved weights; `auto` is `model.fsdp_config.model_dtype`."""
    resume_mode: str = "auto"
    """`auto` goes on from the newest whole checkpoint of the run folder, `disable` refuses a folder that holds some;
    the path or URL of a `global_step_N` folder goes on from that one."""
    max_ckpt_to_keep: Annotated[int, Ge(1)] | None = None
    """Newest checkpoints that are kept; null keeps all."""
    save_best: bool = False
    """Save after each validation with the highest `val/accuracy` so far, and never delete that checkpoint; best.json
    names it."""
    async_save: bool = False
    """Write in the background: training waits for the copy to host memory only, which needs room there for this
    process's share of weights and optimizer state."""
    default_hdfs_dir: str | None = None
    """A second place that finished checkpoints are copied to: any URL that fsspec knows (hdfs://, s3://, gs://).
    `experiment_name` is appended as for the run folder; nothing is ever deleted there."""
