"""What all processes of a run must agree on before they train: where it writes, its settings, its plan."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rm_gallery.data.batching.plan import Plan
from rm_gallery.distributed.process_group import World, from_main, gather
from rm_gallery.errors import UserError
from rm_gallery.training.config import TrainConfig

# Machines may keep the same files at different places; the plan's fingerprint holds what was read from them.
_MAY_DIFFER = (
    "model.partial_pretrain", "data.train_files", "data.val_files", "data.custom_cls.path", "data.cache_dir",
)  # fmt: skip


def agree_on_run(config: TrainConfig, world: World) -> TrainConfig:
    """The configuration with rank 0's run folder: a time stamp in its name differs between machines and restarts.

    Raises UserError, on every process, for a setting that is not the same everywhere.
    """
    if world.world_size == 1:
        return config
    trainer = config.trainer
    folder, name, stands_in = from_main((trainer.default_local_dir, trainer.experiment_name, os.getcwd()))
    if stands_in != os.getcwd():
        folder = os.path.join(stands_in, os.path.expanduser(folder))
    config = replace(config, trainer=replace(trainer, default_local_dir=folder, experiment_name=name))
    settings = gather(_flat(config.as_dict()))
    for other, found in enumerate(settings):
        for key, value in settings[0].items():
            if found.get(key) != value and key not in (*_MAY_DIFFER, "trainer.default_local_dir"):
                raise UserError(
                    f"{key}={found.get(key)} on rank {other}, but {value} on rank 0; start all with the same settings"
                )
    return config


def agree_on_plan(plan: Plan) -> None:
    """Raise UserError, on every process, when they read different data."""
    fingerprints = gather(plan.fingerprint())
    for other, found in enumerate(fingerprints):
        if found != fingerprints[0]:
            raise UserError(
                f"data.train_files: rank {other} read other data than rank 0; give every machine the same files"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level: `model.fsdp_config.model_dtype`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
