"""What a run saves: the identity that a resumed run must have, and the parts that write its checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from rm_gallery.data.batching.loader import Phase
from rm_gallery.distributed.collectives import HostGroup
from rm_gallery.modeling.generic_class import CODE_FILE, is_generic
from rm_gallery.modeling.parallel.apply import DTYPES
from rm_gallery.modeling.parallel.master_weights import TrainedWeights
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.objectives import Objective
from rm_gallery.training.checkpoint import PLAN, Checkpoints, Mirror, RunIdentity, RunTensors, Start, WeightsFolder
from rm_gallery.training.checkpoint.save import LanguageFolder
from rm_gallery.training.config import TrainConfig
from rm_gallery.training.data_setup import Loaded
from rm_gallery.training.metric_names import of_average
from rm_gallery.training.model_card import model_card
from rm_gallery.training.model_setup import StartModel
from rm_gallery.training.optim import build_schedule
from rm_gallery.training.run_dir import package_versions

_NUM_PROBES = 4  # shortest training groups, scored again from a saved checkpoint to verify it


def model_shape(model: RewardModel) -> str:
    """The model's architecture as text, to compare runs; call it before the parameters are sharded."""
    parameters = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    digest = hashlib.sha256(repr(parameters).encode()).hexdigest()[:8]
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{model.network.config.model_type} with {count} parameters ({digest})"


def run_identity(config: TrainConfig, phases: Sequence[Phase], shape: str) -> RunIdentity:
    """What a checkpoint must have in common with the run that resumes from it."""
    data, plan = phases[0].data, phases[0].plan
    return RunIdentity(
        fixed={
            "training data": f"fingerprint {data.fingerprint()}",
            "trainer.seed": config.trainer.seed,
            "model": shape,
            **({"model.quantization": config.model.quantization} if config.model.quantization else {}),
            PLAN: f"fingerprint {plan.fingerprint()}",
            **({"objective.regression_steps": phases[0].num_steps} if len(phases) > 1 else {}),
        },
        config=config.to_compare(),
        total_steps=sum(phase.num_steps for phase in phases),
        rate_at=lambda total_steps, step: build_schedule(config.optim, total_steps)(step),
    )


def build_checkpoints(
    config: TrainConfig, objective: Objective, start: StartModel, weights: TrainedWeights, tensors: RunTensors,
    tokenizer: Any, train: Loaded, ranks: HostGroup, identity: RunIdentity, begin: Start,
) -> Checkpoints:  # fmt: skip
    """Collective: every rank must call it at the same place."""
    computes, wanted = config.model.fsdp_config.model_dtype, config.trainer.export_dtype
    written = computes if wanted == "auto" else wanted
    shortest = np.argsort(train.data.sizes.longest_text, kind="stable")[:_NUM_PROBES]
    kind = LanguageFolder if objective.reads == "tokens" else WeightsFolder
    weights_folder = kind(
        start.model,
        tokenizer,
        replace(
            train.input_record(config.data, tokenizer, config.model),
            objective={"name": config.objective.name} if objective.parameters() else {},
        ),
        DTYPES[written],
        weights.device,
        exact=computes == written == "fp32" and config.model.quantization != "int8",  # it rounds activations
        probes=[train.data[int(index)] for index in shortest],
        adapter=start.adapter,
        normalize=config.trainer.reward_statistics == "normalize",
        describe=objective.record,
    )
    url, record = config.trainer.mirror_url, weights_folder.record
    card = partial(
        model_card, config, num_parameters=start.num_parameters, num_trained=start.num_trained,
        comparisons=train.data.num_comparisons, input_style=record.input_style, separator=record.separator,
        adds_special_tokens=bool(tokenizer.cls_token), versions=package_versions("torch", "transformers"),
        code_file=CODE_FILE if is_generic(start.model.network) else "", renames=start.renames, unit=train.data.unit,
    )  # fmt: skip
    return Checkpoints(
        config.trainer.run_dir, config.trainer, tensors, weights_folder, ranks,
        facts=identity.facts(begin.origin), mirror=Mirror(url) if url and ranks.rank == 0 else None,
        latest=begin.folder, card=lambda progress, values, ema: card(
            step=progress.step, metrics=of_average(progress.last_val) if ema else progress.last_val,
            metrics_step=progress.last_val_step, objective=values, ema=ema,
        ),
    )  # fmt: skip
