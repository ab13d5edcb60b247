"""What the log says about the way some model types run, for docs/models.md."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.small_models import NO_DEFAULTS, config_of
from rm_gallery.errors import UserError
from rm_gallery.modeling.model_folder import check_class
from rm_gallery.modeling.packing import check_loaded, choose_way
from rm_gallery.modeling.twin import build_twin
from rm_gallery.objectives import OBJECTIVES
from rm_gallery.training.config import TrainConfig
from rm_gallery.training.data_setup import check_data

LINES = (
    "qwen2", "olmo2", "qwen3_moe", "gemma2", "gpt_oss", "qwen3_next", "bamba", "falcon", "bloom", "t5", "bert",
    "mamba", "mobilebert", "fnet", "vit", "kimi_k25", "phi3",
)  # fmt: skip


def log_lines() -> list[str]:
    """For some types the line of the log about the way they run, or the error; for Phi-3 that of texts above 4,096."""
    return [f"| {kind} | {_log_line(kind).replace('|', '/')} |" for kind in LINES]


def _log_line(kind: str) -> str:
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **NO_DEFAULTS.get(kind, {}))
    try:
        if kind == "phi3":
            factors = [1.0] * 48
            rope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
            config = config_of(kind, original_max_position_embeddings=4096, rope_scaling=rope)
            model: Any = SimpleNamespace(network=SimpleNamespace(config=config))
            sizes = SimpleNamespace(longest_text=np.array([5000]))
            data: Any = SimpleNamespace(data=SimpleNamespace(sizes=sizes, labels=lambda: (), all_zero=lambda _: False))
            check_data(TrainConfig(), OBJECTIVES["bradley_terry"], model, data, None)
        check_class(config, what=kind)
        way = choose_way(config, "auto", what=kind)
        if not way.is_checked:
            check_loaded(build_twin(config), what=kind)
        return f"model.packing=auto: {way}"
    except UserError as error:
        return f"error: {str(error).removeprefix(f'{kind}: ')}"
