"""The reward model: a sequence classification model of transformers with one label, called on PackedBatches.

Decoders run on packed tokens with shared prompts. Encoders attend in both directions, so texts cannot share a prompt:
they run on padded texts behind the same interface, as do decoders that cannot be packed (`packing.py`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.modeling.architectures import positions_after_padding
from rm_gallery.modeling.attention.past import PastKeys
from rm_gallery.modeling.config import AttentionKernel, PackingSetting
from rm_gallery.modeling.decoder_layers import adapt
from rm_gallery.modeling.forward import head_of, packed_rewards, packed_token_rewards, padded_rewards
from rm_gallery.modeling.model_folder import open_model
from rm_gallery.modeling.packing import Way

log = logging.getLogger(__name__)

# R responses


class RewardModel(nn.Module):
    """A one-label sequence classification model of transformers, called on packed batches."""

    is_language_model = False
    """Whether it predicts tokens, through an output layer that is part of its base model."""

    def __init__(self, network: Any, way: Way) -> None:
        """way: how texts are batched; see `choose_way`, which has to precede the loading of the network."""
        super().__init__()
        self.network = network
        self.way = way
        self.padded = not way.packed
        """Whether texts are padded or packed with shared prompts."""
        self.attention: AttentionKernel = "auto"
        # The head computes in its own dtype, float32 for every dtype of the backbone.
        self.head.register_forward_pre_hook(_cast_input)
        self._reads_only_rewards = way.own_layers and adapt(getattr(network, network.base_model_prefix))

    @property
    def head(self) -> nn.Module:
        """The module whose output is the reward: `score` in decoders, `classifier` in encoders."""
        found = head_of(self.network)
        assert found is not None
        return found

    def forward(self, batch: PackedBatch, past: PastKeys | None = None) -> Tensor:
        """Rewards [R] float32, one per response, or [R, A] with A attributes; an empty batch gives [0].

        past: keys and values of prefixes that are known, of a model that is packed.
        """
        if self.padded:
            return padded_rewards(self.network, batch)
        return packed_rewards(
            self.network, batch, self.attention, reads_only_rewards=self._reads_only_rewards, past=past
        )

    def token_rewards(self, batch: PackedBatch) -> Tensor:
        """[T] float32, or [T, A]: the reward read at every token of a batch, that of the text up to it.

        Of a model that is packed: an encoder's tokens see those after them.
        """
        return packed_token_rewards(self.network, batch, self.attention)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Disable gradients and dropout in the block; restores the training mode."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(was_training)


def _cast_input(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(value.to(dtype) if isinstance(value, Tensor) else value for value in arguments)


@dataclass(frozen=True)
class LoadedModel:
    """A model in float32 on the CPU, and which of its tensors were missing in the folder."""

    model: RewardModel
    head_name: str = ""
    """Tensor of the folder that the reward head was loaded from; empty if the head is newly initialized."""
    head_bias: float = 0.0
    """Constant that the folder's head adds to each reward. `model` is without it: `score` has no bias."""
    new_parts: tuple[str, ...] = ()
    """Names of tensors missing in the folder (head, pooler): newly initialized, to be trained."""
    wrapper: str = ""
    """Type of the folder's wrapper of several models, whose text model this is."""
    renames: Mapping[str, str] = field(default_factory=dict)
    """Patterns of names in the wrapper's files and what replaces them."""

    @property
    def has_own_head(self) -> bool:
        """Whether the folder has the weights of the reward head."""
        return bool(self.head_name)


def load_reward_model(
    path: str, *, key: str = "model.partial_pretrain", trust_remote_code: bool = False, dropout: float = 0.0,
    new_head: bool | None = False, packing: PackingSetting = "auto", attributes: Sequence[str] = (),
) -> LoadedModel:  # fmt: skip
    """Load a backbone or a reward model as a sequence classification model with one label, or one per attribute.

    key: configuration key that `path` comes from, for messages. new_head: initialize a new head even if the folder has
    one; None never initializes a weight. packing: see `choose_way`. Raises UserError for a folder without configuration
    or weights, an architecture that is not supported, a head that cannot be run, a reward model without its head, and
    weights that are incomplete, quantized, all zero or not finite.
    """
    from transformers import AutoModelForSequenceClassification

    source = open_model(
        path, key=key, trust_remote_code=trust_remote_code, dropout=dropout, new_head=new_head, packing=packing,
        attributes=attributes,
    )  # fmt: skip
    network, head = source.load(AutoModelForSequenceClassification, torch.float32, trust_remote_code=trust_remote_code)
    return LoadedModel(
        RewardModel(network, source.way), head.name, head.bias, head.new_parts, source.wrapper, source.renames
    )


def max_positions(model: RewardModel) -> int | None:
    """Maximum number of tokens of one text by the model's position embeddings; None if there is no limit."""
    config = model.network.config
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None:
        limit -= positions_after_padding(config.model_type, config.pad_token_id)
    return limit


def has_position_table(model: nn.Module, limit: int | None) -> bool:
    """Whether the model has a table of absolute positions, learned or not, which limits the length of a text."""
    if limit is None:
        return False
    found = [getattr(each, "pos_encoding", None) for each in model.modules()]  # CTRL has no buffer
    tables: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    tables += [("pos_encoding", each) for each in found if isinstance(each, Tensor)]
    return any(
        tensor.ndim == 2
        and limit <= tensor.shape[0] <= limit + 8  # some tables have rows before position 0 (RoBERTa: 2)
        and not name.endswith(".weights")  # XGLM extends it
        and re.search(r"position|wpe\b|pos_encoding", ".".join(name.split(".")[-2:]))
        for name, tensor in tables
    )


def max_rotary_positions(config: Any) -> int | None:
    """Longest text whose rotary embedding does not depend on the batch; None if no length changes it.

    With rope_type `dynamic` or `longrope`, a text above this length changes the frequencies of all texts of its batch.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    limits = [
        part.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for part in parts
        if part.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=None)
