"""The reward model: a sequence classification model of transformers with one label, called on PackedBatches.

Decoders run on packed tokens with shared prompts. Encoders attend in both directions, so texts cannot share a prompt:
they run on padded texts behind the same interface.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.errors import UserError, one_line
from rm_gallery.modeling.architectures import DECODERS, ENCODERS, architecture
from rm_gallery.modeling.attention import dispatch
from rm_gallery.modeling.config import AttentionKernel
from rm_gallery.modeling.decoder_layers import adapt

log = logging.getLogger(__name__)

# T tokens, R responses, L longest text, D hidden

HEADS = ("score", "classifier")
_HEAD_PARTS = (*HEADS, "pooler", "head.")  # may be missing in the weights of a backbone


class RewardModel(nn.Module):
    """A one-label sequence classification model of transformers, called on packed batches."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.padded = network.config.model_type not in DECODERS
        """Whether texts are padded (encoders) or packed with shared prompts (decoders)."""
        self.attention: AttentionKernel = "auto"
        # The head computes in its own dtype, float32 for every dtype of the backbone.
        self.head.register_forward_pre_hook(_cast_input)
        self._reads_only_rewards = not self.padded and adapt(self._backbone)

    @property
    def head(self) -> nn.Module:
        """The module whose output is the reward: `score` in decoders, `classifier` in encoders."""
        return next(getattr(self.network, name) for name in HEADS if hasattr(self.network, name))

    @property
    def _backbone(self) -> Any:
        return getattr(self.network, self.network.base_model_prefix)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Rewards [R] float32, one per response; an empty batch gives [0]."""
        if self.padded:
            return self._padded_rewards(batch)
        return self._packed_rewards(batch)

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

    def _packed_rewards(self, batch: PackedBatch) -> Tensor:
        count = len(batch.reward_index)
        if not batch.num_tokens:
            batch = _one_token(batch)
        hidden = self._backbone(
            input_ids=batch.input_ids.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            use_cache=False,
            packed=dispatch.lay_out(batch, self.attention),
        ).last_hidden_state[0]  # [R, D], or [T, D]
        if not self._reads_only_rewards:
            hidden = hidden.index_select(0, batch.reward_index)
        # A clone, since FSDP2 registers its backward hooks on the outputs, which may not be views.
        return self.head(hidden)[:count].squeeze(-1).float().clone()

    def _padded_rewards(self, batch: PackedBatch) -> Tensor:
        input_ids, mask = pad_texts(batch, self.network.config.pad_token_id)
        logits = self.network(input_ids=input_ids, attention_mask=mask).logits  # [R or 1, 1]
        return logits[: len(batch.reward_index), 0].float().clone()


def _one_token(batch: PackedBatch) -> PackedBatch:
    """The empty batch with one dummy token, whose reward is discarded.

    A rank without data runs this dummy forward pass so that all ranks run the same collectives. Every parameter gets a
    (zero) gradient, the key and value projections included.
    """
    zero = batch.input_ids.new_zeros(1)
    return replace(
        batch,
        input_ids=zero,
        positions=zero,
        group=zero,
        response=zero,
        reward_index=zero,
        group_lengths=(1,),
        tail_lengths=((1,),),
    )


def _cast_input(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(value.to(dtype) if isinstance(value, Tensor) else value for value in arguments)


def pad_texts(batch: PackedBatch, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Full texts, padded on the right: input_ids [R, L] and attention_mask [R, L]; [1, 1] for an empty batch."""
    texts: list[Tensor] = []
    start = 0
    for length, tails in zip(batch.group_lengths, batch.tail_lengths, strict=True):
        tail_start = start + length - sum(tails)
        prefix = batch.input_ids[start:tail_start]
        for tail in tails:
            texts.append(torch.cat([prefix, batch.input_ids[tail_start : tail_start + tail]]))
            tail_start += tail
        start += length
    texts = texts or [batch.input_ids.new_zeros(1)]
    mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    return pad_sequence(texts, batch_first=True, padding_value=pad_token_id), mask


@dataclass(frozen=True)
class LoadedModel:
    """A model in float32 on the CPU, and which of its tensors were missing in the folder."""

    model: RewardModel
    has_own_head: bool
    """Whether the folder has the weights of the reward head; if not, the head is newly initialized."""
    new_parts: tuple[str, ...] = ()
    """Names of tensors missing in the folder (head, pooler): newly initialized, to be trained."""


def load_reward_model(
    path: str, *, key: str = "model.partial_pretrain", trust_remote_code: bool = False, dropout: float = 0.0
) -> LoadedModel:
    """Load a backbone or a reward model as a sequence classification model with one label.

    key: configuration key that `path` comes from, for messages.
    Raises UserError for a folder without configuration or weights, an architecture that is not supported, and a
    classifier with more than one label.
    """
    from transformers import AutoModelForSequenceClassification

    path = os.path.expanduser(path)
    config, extra = network_class_arguments(path, key=key, trust_remote_code=trust_remote_code, dropout=dropout)
    try:
        with quiet_transformers():
            network, info = AutoModelForSequenceClassification.from_pretrained(
                path, config=config, dtype=torch.float32, output_loading_info=True,
                trust_remote_code=trust_remote_code, **extra,
            )  # fmt: skip
    except Exception as error:
        raise UserError(f"{key}={path}: the model cannot be loaded ({one_line(error)})") from error
    missing = sorted(info["missing_keys"])
    lost = lost_parts(missing)
    if lost:
        raise UserError(
            f"{key}={path}: the weights lack {len(lost)} tensors (first: {lost[0]}); is the download complete?"
        )
    return LoadedModel(RewardModel(network), has_head(missing), tuple(missing))


def network_class_arguments(
    path: str, *, key: str, trust_remote_code: bool, dropout: float
) -> tuple[Any, dict[str, Any]]:
    """The folder's configuration with one label and these dropout rates, and more arguments for the library's class."""
    config = load_model_config(path, key=key, trust_remote_code=trust_remote_code)
    config.num_labels = 1
    config.problem_type = "regression"
    for name, value in vars(config).items():
        is_rate = isinstance(value, float | int) and not isinstance(value, bool)
        if is_rate and ("dropout" in name or name.endswith("pdrop")):
            setattr(config, name, dropout)
    extra = {}
    if config.model_type in DECODERS:
        dispatch.install()
        extra["attn_implementation"] = dispatch.NAME
    return config, extra


def lost_parts(missing: Iterable[str]) -> list[str]:
    """Required tensors among the missing ones: all except the reward head and the pooler."""
    return [name for name in missing if not name.startswith(_HEAD_PARTS) and ".pooler." not in name]


def has_head(missing: Iterable[str]) -> bool:
    """Whether a folder with these missing tensors has a reward head."""
    return not any(name.startswith(HEADS) for name in missing)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Disable progress bars and load reports of transformers; the caller reports missing tensors itself."""
    from transformers.utils import logging as library

    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()


def load_model_config(path: str, *, key: str = "model.partial_pretrain", trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a model folder that can be trained.

    Raises UserError for a folder without configuration or weights, an adapter, an architecture that is not
    supported, and a classifier with more than one label.
    """
    config = read_model_config(path, key=key, trust_remote_code=trust_remote_code)
    check_model_config(config, path, key=key)
    return config


def check_model_config(config: Any, path: str, *, key: str) -> None:
    """Raise UserError for a configuration that cannot be trained: see `load_model_config`."""
    if config.model_type not in DECODERS + ENCODERS:
        raise UserError(
            f"{key}={path}: architecture {config.model_type!r} is not supported; "
            f"decoders: {', '.join(DECODERS)}; encoders: {', '.join(ENCODERS)}"
        )
    check_one_label(config, path, key=key, hint="start from its base model")
    if getattr(config, "use_bidirectional_attention", None):
        raise UserError(f"{key}={path}: bidirectional attention (use_bidirectional_attention) cannot be packed")


def check_one_label(config: Any, path: str, *, key: str, hint: str) -> None:
    """Raise UserError, ending in `hint`, for a classifier with more than one label."""
    is_classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
    if is_classifier and config.num_labels != 1:
        raise UserError(
            f"{key}={path}: a classifier with {config.num_labels} labels, but a reward model has one; {hint}"
        )


def read_model_config(path: str, *, key: str, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a model folder of any architecture.

    Raises UserError for an adapter and for a folder without configuration or weights.
    """
    from transformers import AutoConfig

    folder = Path(path).expanduser()
    if folder.is_dir() and (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{key}={path}: the folder holds an adapter; merge it into its base model first")
    if not folder.exists() and (folder.is_absolute() or path.startswith((".", "~"))):
        raise UserError(f"{key}={path}: no such folder (working directory {Path.cwd()})")
    try:
        config = AutoConfig.from_pretrained(os.path.expanduser(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(
            f"{key}={path}: no model found ({one_line(error)}); name a folder with config.json and weights"
        ) from error
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise UserError(f"{key}={path}: the folder has no weights; copy the model's *.safetensors files there")
    return config


def max_positions(model: RewardModel) -> int | None:
    """Maximum number of tokens of one text by the model's position embeddings; None if there is no limit."""
    config = model.network.config
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and architecture(config.model_type).positions_after_padding:
        limit -= config.pad_token_id + 1  # positions start after the padding id
    return limit
