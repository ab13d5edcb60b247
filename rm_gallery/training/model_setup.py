"""The model that a run starts from: whole in this process, or an outline where its weights are cut over several."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from rm_gallery.distributed.process_group import World
from rm_gallery.modeling.export import lacking_rows, settle_pad_token
from rm_gallery.modeling.meta_init import NoOutline, WeightFiles, outline_reward_model
from rm_gallery.modeling.parallel.apply import resolve_strategy
from rm_gallery.modeling.parallel.strategy import Strategy
from rm_gallery.modeling.reward_model import (
    LoadedModel,
    RewardModel,
    load_reward_model,
)
from rm_gallery.training.config import TrainConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartModel:
    """What `apply` of modeling/parallel takes."""

    model: RewardModel
    strategy: Strategy
    files: WeightFiles | None = None
    """Where the weights lie, for a model without them; None: they are in it."""
    num_parameters: int = 0
    """Of the whole model."""


def start_model(config: TrainConfig, tokenizer: Any, world: World) -> StartModel:
    """The model with a pad token that is not EOS; says where its head comes from.

    Where the weights will be cut over processes, none of them reads more than its part, unless the library must load
    the folder itself; a line says so then. Raises UserError for a folder that cannot be loaded.
    """
    outline, reason = None, ""
    if world.world_size > 1 or (world.device.type == "cuda" and config.model.fsdp_config.offloads_weights):
        try:
            outline = _outline(config, tokenizer)
        except NoOutline as error:
            reason = str(error)
    model = outline[0].model if outline else build_model(config, tokenizer)
    count = sum(parameter.numel() for parameter in model.parameters())
    strategy = resolve_strategy(config.model, world, count)
    if strategy != "fsdp2":
        return StartModel(build_model(config, tokenizer) if outline else model, strategy, None, count)
    if outline is None:
        log.warning("each process reads the whole model before it is cut, since %s", reason)
        return StartModel(model, strategy, None, count)
    loaded, files = outline
    if loaded.has_own_head:
        log.info("reward head: kept from %s", config.model.partial_pretrain)
    else:
        log.info("reward head: new, initialised with trainer.seed=%d", config.trainer.seed)
    return StartModel(model, strategy, files, count)


def _outline(config: TrainConfig, tokenizer: Any) -> tuple[LoadedModel, WeightFiles]:
    with torch.random.fork_rng(devices=[]):  # the model that is loaded whole after all finds the generator as it was
        loaded, files = outline_reward_model(
            config.model.partial_pretrain,
            seed=config.trainer.seed,
            trust_remote_code=config.model.trust_remote_code,
            dropout=config.model.dropout,
        )
    if lacking_rows(loaded.model, tokenizer):
        raise NoOutline("its embeddings get more rows for the tokenizer")
    settle_pad_token(loaded.model, tokenizer)
    return loaded, files


def build_model(config: TrainConfig, tokenizer: Any) -> RewardModel:
    """The model in float32 on the CPU, with a pad token that is not EOS; says where its head comes from."""
    loaded = load_reward_model(
        config.model.partial_pretrain,
        trust_remote_code=config.model.trust_remote_code,
        dropout=config.model.dropout,
    )
    if config.model.trust_remote_code:
        log.warning("model.trust_remote_code=true: Python code of the model folder may run")
    if loaded.has_own_head:
        log.info("reward head: kept from %s", config.model.partial_pretrain)
    else:
        log.info("reward head: new, initialised with trainer.seed=%d", config.trainer.seed)
    settle_pad_token(loaded.model, tokenizer)
    return loaded.model
