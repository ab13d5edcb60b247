"""The auxiliary language-model loss of a reward model: `objective.lm_coefficient`.

Yang et al. 2024, "Regularizing Hidden States Enables Learning Generalizable Reward Model for LLMs" (GRM): the backbone
also predicts the tokens of the preferred responses, so that its hidden states stay those of a language model. Both read
one forward pass. The output layer is the folder's: the embedding where they are tied, which is trained as before; its
own weights otherwise, which are fixed, since the checkpoint of a reward model has no place for them.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.errors import UserError
from rm_gallery.modeling.attention import dispatch
from rm_gallery.modeling.config import PackingSetting
from rm_gallery.modeling.cross_entropy import TokenLosses, logit_scale, target_losses
from rm_gallery.modeling.decoder_layers import restore_last_layer
from rm_gallery.modeling.forward import head_of, one_token, packed_hidden
from rm_gallery.modeling.language_model import language_model_way
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.modeling.text_part import text_files
from rm_gallery.modeling.weight_files import read_weight_folder

_KEY = "objective.lm_coefficient"


class RewardsAndLosses(NamedTuple):
    """What a reward model with a language-model loss gives in training."""

    rewards: Tensor
    """See `RewardModel.forward`."""
    language: TokenLosses
    """Of the targets of the batch."""


def add_language_loss(model: RewardModel, path: str, *, packing: PackingSetting, wrapper: bool = False) -> None:
    """Let the model give `RewardsAndLosses` in training, in place; call it before the model is sharded.

    path: the folder that it was loaded from. Raises UserError for a model that is no packed causal language model, and
    for a folder without the output layer of one.
    """
    network, what = model.network, f"{_KEY}: {path}"
    way = language_model_way(network.config, packing, what=what)
    if model.padded or not way.packed:
        raise UserError(f"{what}: it needs packed texts ({model.way.reason}); set 0")
    if model.way.own_layers:
        restore_last_layer(getattr(network, network.base_model_prefix))
        model._reads_only_rewards = False
    if not network.config.tie_word_embeddings:
        files = read_weight_folder(path, key="model.partial_pretrain")
        if wrapper:
            files, _ = text_files(network.config, files, what=what)
        entry = files.tensors.get("lm_head.weight") or files.tensors.get("embed_out.weight")
        if entry is None:
            raise UserError(
                f"{what} has no output layer of a language model (lm_head.weight in safetensors, or tied embeddings); "
                "start from a language model, or set 0"
            )
        with safe_open(entry.file, framework="pt") as source:
            model.register_buffer("output_layer", source.get_tensor(entry.name).float(), persistent=False)
    model.forward = MethodType(_forward, model)  # type: ignore[method-assign]


def _forward(model: Any, batch: PackedBatch, *arguments: Any, **options: Any) -> Any:
    if not model.training:
        return RewardModel.forward(model, batch, *arguments, **options)
    source, target, weight = batch.target_source, batch.target_token, batch.target_weight
    count = len(batch.reward_index)
    if not batch.num_tokens:
        batch = one_token(batch)
    if not len(source):
        source, target, weight = (each.new_zeros(1) for each in (source, target, weight))
    layout = dispatch.lay_out(batch, model.attention)
    hidden = packed_hidden(model.network, batch, layout)  # [T, D]
    head = head_of(model.network)
    assert head is not None
    rewards = head(hidden.index_select(0, layout.reward_index))[:count].squeeze(-1).float().clone()
    losses = target_losses(
        hidden.index_select(0, source), _output_weight(model, hidden), None, target, weight,
        logit_scale(model.network.config),
    )  # fmt: skip
    return RewardsAndLosses(rewards, losses._replace(total=losses.total.clone()))


def _output_weight(model: Any, hidden: Tensor) -> Tensor:
    own = getattr(model, "output_layer", None)
    if own is None:
        weight: Tensor = model.network.get_input_embeddings().weight
        return weight
    if own.dtype != hidden.dtype or own.device != hidden.device:
        model.output_layer = own = own.to(hidden.device, hidden.dtype)
    return own
