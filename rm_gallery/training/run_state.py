"""From a configuration to what its checkpoints need: what the run is, what is saved, and how."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from typing import Any

import numpy as np

from rm_gallery.data.batching.plan import PackingConfig, Plan
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.modeling.parallel.apply import DTYPES, TrainedWeights
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.training.checkpoint import PLAN, Checkpoints, Copies, RunIdentity, RunTensors, Start, WeightsFolder
from rm_gallery.training.config import DataConfig, TrainConfig
from rm_gallery.training.inputs import Loaded
from rm_gallery.training.optim import build_schedule
from rm_gallery.training.ranks import Ranks

_NUM_PROBES = 4  # shortest training groups, rescored from a checkpoint


def model_shape(model: RewardModel) -> str:
    """The model's architecture, for a comparison of runs; to be asked before its weights are cut."""
    parameters = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    digest = hashlib.sha256(repr(parameters).encode()).hexdigest()[:8]
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{model.network.config.model_type} with {count} parameters ({digest})"


def packing(data: DataConfig) -> PackingConfig:
    """What decides the plan, without where the data lie."""
    return PackingConfig(**{each.name: getattr(data, each.name) for each in fields(PackingConfig)})


def run_identity(config: TrainConfig, data: TokenData, plan: Plan, shape: str, total_steps: int) -> RunIdentity:
    """What makes a run this run: under anything else a checkpoint is refused."""
    return RunIdentity(
        fixed={
            "training data": f"fingerprint {data.fingerprint()}",
            "trainer.seed": config.trainer.seed,
            "model": shape,
            PLAN: f"fingerprint {plan.fingerprint()}",
        },
        config=config.as_dict(),
        total_steps=total_steps,
        rate_at=lambda total_steps, step: build_schedule(config.optim, total_steps)(step),
    )


def build_checkpoints(
    config: TrainConfig, model: RewardModel, weights: TrainedWeights, tensors: RunTensors, tokenizer: Any,
    train: Loaded, ranks: Ranks, identity: RunIdentity, begin: Start,
) -> Checkpoints:  # fmt: skip
    """Every rank makes one at the same place."""
    computes, wanted = config.model.fsdp_config.model_dtype, config.trainer.export_dtype
    written = computes if wanted == "auto" else wanted
    shortest = np.argsort(train.data.sizes.longest_text, kind="stable")[:_NUM_PROBES]
    weights_folder = WeightsFolder(
        model,
        tokenizer,
        train.input_record(config.data, tokenizer),
        DTYPES[written],
        weights.device,
        exact=computes == written == "fp32",
        probes=[train.data[int(index)] for index in shortest],
    )
    url = config.trainer.copies_url
    return Checkpoints(
        config.trainer.run_dir, config.trainer, tensors, weights_folder, ranks,
        facts=identity.facts(begin.origin), copies=Copies(url) if url and ranks.rank == 0 else None,
        latest=begin.folder,
    )  # fmt: skip
