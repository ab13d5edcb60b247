"""How a new reward head starts: `model.head_init`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rm_gallery.errors import UserError
from rm_gallery.modeling.config import HeadInit
from rm_gallery.modeling.cross_entropy import logit_scale
from rm_gallery.modeling.reward_model import LoadedModel
from rm_gallery.modeling.text_part import text_files
from rm_gallery.modeling.weight_files import read_weight_folder

log = logging.getLogger(__name__)

_OUTPUTS = ("lm_head.weight", "embed_out.weight")
"""The output layer of a causal language model; `embed_out` in GPT-NeoX."""


def init_head(
    loaded: LoadedModel, setting: HeadInit, words: Sequence[str], tokenizer: Any, *, path: str,
    new: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Set the last layer of a newly initialized head in place; `normal` keeps transformers' values.

    zero: every reward starts at 0. lm_head_difference: the reward starts as the logit of the first word minus that of
    the second, as the language model of the folder predicts them at the last token. words: see `model.head_init_words`.
    new: for a model on the meta device, the values of its new tensors (`WeightFiles.new`), which are set instead.

    Raises UserError for a head that is not new, and for a language model without the rows of these words.
    """
    if setting == "normal":
        return
    what, network = f"model.head_init={setting}", loaded.model.network
    if loaded.has_own_head:
        raise UserError(f"{what}: {path} has a reward head; set model.new_head=true to replace it, or remove the key")
    last = [each for each in loaded.model.head.modules() if isinstance(each, nn.Linear)][-1]
    place = {parameter: name for name, parameter in network.named_parameters()}
    values = {place[last.weight]: torch.zeros(last.weight.shape)}
    if last.bias is not None:
        values[place[last.bias]] = torch.zeros(last.bias.shape)
    if setting == "lm_head_difference":
        better, worse = (_output_row(loaded, _token(tokenizer, word, what), path, what) for word in words)
        if last is not getattr(network, "score", None) or last.weight.shape != (1, *better.shape):
            raise UserError(f"{what}: the reward head of {network.config.model_type} is not one row of its language "
                            "model's head; set normal or zero")  # fmt: skip
        values[place[last.weight]] = (better - worse).unsqueeze(0) * logit_scale(network.config).factor
        if cap := getattr(network.config, "final_logit_softcapping", None):
            log.warning("%s: rewards start as differences of logits before their soft cap of %g", what, cap)
    for name, value in values.items():
        target = network.get_parameter(name) if new is None else new[name]
        target.data.copy_(value)


def _token(tokenizer: Any, word: str, what: str) -> int:
    ids: list[int] = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise UserError(
            f"{what}: {word!r} is {len(ids)} tokens of this tokenizer, and must be one; set model.head_init_words"
        )
    return ids[0]


def _output_row(loaded: LoadedModel, token: int, path: str, what: str) -> Tensor:
    """The row of a token in the output layer of the folder's language model, in float32."""
    network, files = loaded.model.network, read_weight_folder(path, key="model.partial_pretrain")
    if loaded.wrapper:
        files, _ = text_files(network.config, files, what=what)
    tensors = files.tensors
    embedding = network.get_input_embeddings().weight
    inputs = next(name for name, parameter in network.named_parameters() if parameter is embedding)
    names = list(_OUTPUTS)
    if network.config.tie_word_embeddings:  # the embedding is the output layer
        names += [inputs, inputs.removeprefix(f"{network.base_model_prefix}.")]
    name = next((each for each in names if each in tensors), None)
    if name is None:
        raise UserError(
            f"{what}: {path} has no output layer of a language model (lm_head.weight in safetensors, or tied "
            "embeddings); set normal or zero"
        )
    entry = tensors[name]
    if token >= entry.shape[0]:
        raise UserError(f"{what}: {name} has {entry.shape[0]} rows, and token {token} is beyond them")
    with safe_open(entry.file, framework="pt") as source:
        row: Tensor = source.get_slice(entry.name)[token : token + 1]
    return row[0].float()
