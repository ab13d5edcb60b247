"""All ranks train with the same settings and data, or none trains."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rm_gallery.data.batching.plan import Plan
from rm_gallery.data.sources.config import EVAL_SETS
from rm_gallery.distributed.collectives import all_gather, broadcast
from rm_gallery.distributed.process_group import World
from rm_gallery.errors import UserError
from rm_gallery.training.config import TrainConfig

# Machines may have the same files at different paths; the fingerprint of the plan covers their contents.
_MAY_DIFFER = (
    "model.partial_pretrain", "data.train_files", "data.val_files", "data.custom_cls.path", "data.cache_dir", EVAL_SETS,
)  # fmt: skip


def agree_on_run(config: TrainConfig, world: World) -> TrainConfig:
    """The configuration with rank 0's run directory, whose name may hold a time stamp that differs between machines.

    Raises UserError on every rank if a setting differs between ranks.
    """
    if world.world_size == 1:
        return config
    trainer = config.trainer
    folder, name, main_cwd = broadcast((trainer.default_local_dir, trainer.experiment_name, os.getcwd()))
    if main_cwd != os.getcwd():
        folder = os.path.join(main_cwd, os.path.expanduser(folder))
    config = replace(config, trainer=replace(trainer, default_local_dir=folder, experiment_name=name))
    settings = all_gather(_flat(config.as_dict()))
    for rank, found in enumerate(settings):
        for key, value in settings[0].items():
            if found.get(key) != value and not key.startswith((*_MAY_DIFFER, "trainer.default_local_dir")):
                raise UserError(
                    f"{key}={found.get(key)} on rank {rank}, but {value} on rank 0; start all ranks with the same "
                    "settings"
                )
    return config


def agree_on_plan(plan: Plan) -> None:
    """Raise UserError on every rank if the ranks read different data."""
    fingerprints = all_gather(plan.fingerprint())
    for rank, found in enumerate(fingerprints):
        if found != fingerprints[0]:
            raise UserError(
                f"data.train_files: rank {rank} read different data than rank 0; give every machine the same files"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections flattened to dotted keys, e.g. `model.fsdp_config.model_dtype`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
