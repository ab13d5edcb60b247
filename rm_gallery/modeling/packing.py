"""The way a model runs: packed tokens with shared prompts, or padded texts. `model.packing` is the setting.

The types of `ARCHITECTURES` have a fixed way, since their exactness is tested. For any other type a check decides: on a
twin (`twin.py`), rewards of packed tokens through the library's layers and rewards of a padded batch are compared with
one text at a time through plain transformers, in float32. The first that is equal is used; if none is, the model is
refused, so that no reward depends on the texts beside it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rm_gallery.data.batching.packed_batch import PackedBatch, collate
from rm_gallery.data.tokenization.token_group import TokenGroup
from rm_gallery.errors import UserError, one_line
from rm_gallery.modeling.architectures import DECODERS, ENCODERS, closing_token
from rm_gallery.modeling.attention import dispatch
from rm_gallery.modeling.config import PackingSetting
from rm_gallery.modeling.forward import head_of, packed_rewards, padded_rewards, text_rewards
from rm_gallery.modeling.heads import HEADS
from rm_gallery.modeling.twin import VOCABULARY, NoTwinError, build_twin

TOLERANCE = 1e-4
"""Absolute, and relative to the reward."""
_MIN_EFFECT = 2e-3
"""Rewards of the check differ by more than this between texts, and if a text has another token: it sees errors."""


@dataclass(frozen=True)
class Way:
    """How a model runs."""

    packed: bool
    """Packed tokens with shared prompts; otherwise padded texts."""
    reason: str
    """Why, for the log."""
    own_layers: bool = False
    """Packed through `decoder_layers.adapt`, otherwise through the library's layers."""
    difference: float | None = None
    """The largest difference from one text at a time in the check; None without a check."""
    is_checked: bool = True
    """False: no twin could be built, so the loaded model has to be checked (`check_loaded`)."""

    def __str__(self) -> str:
        layers = "" if not self.packed or self.own_layers else " with transformers' layers"
        return f"{'packed' if self.packed else 'padded'}{layers}: {self.reason}"


class ChooseWay(Protocol):
    """`choose_way`, or the same for a language model."""

    def __call__(self, config: Any, setting: PackingSetting, *, what: str) -> Way: ...


def choose_way(config: Any, setting: PackingSetting, *, what: str) -> Way:
    """The way for a configuration of transformers.

    what: the model, for messages. Raises UserError for a type whose padded rewards are not exact, for one whose head
    cannot be run, and for `packed` where the rewards of packed tokens are not exact.
    """
    kind, is_bidirectional = config.model_type, bool(getattr(config, "use_bidirectional_attention", None))
    if kind in DECODERS and not is_bidirectional:
        if setting != "padded":
            return Way(True, f"{kind} is a decoder that is tested packed", own_layers=True)
        return Way(False, "model.packing=padded")
    if kind in ENCODERS:
        way = Way(False, f"{kind} attends in both directions")
    else:
        way = _tried(ConfigKey(config, setting == "padded"))
    if way.difference is not None and math.isnan(way.difference):
        raise (OtherHeadError if way.reason.startswith("architecture") else UserError)(f"{what}: {way.reason}")
    if setting == "packed" and not way.packed:
        raise UserError(f"{what}: model.packing=packed is not possible ({way.reason}); set auto")
    return way


class OtherHeadError(UserError):
    """A sequence classification model whose head is not read, or that wraps several models."""


class ConfigKey:
    """A configuration that is equal to another with the same values."""

    def __init__(self, config: Any, padded_only: bool) -> None:
        self.config, self.padded_only = config, padded_only
        self._text = f"{type(config).__name__} {config.to_json_string(use_diff=False)} {padded_only}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfigKey) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)


def _refused(reason: str) -> Way:
    return Way(False, reason, difference=math.nan)


@functools.lru_cache(maxsize=256)
def _tried(key: ConfigKey) -> Way:
    """The first way that is exact on the twin; one with the difference NaN if none is."""
    kind = key.config.model_type
    try:
        twin = build_twin(key.config)
    except NoTwinError as error:
        reason = one_line(error)
        return Way(False, f"no small {kind} can be built to try packing ({reason})", is_checked=False)
    if head_of(twin) is None:
        return _refused(
            f"architecture {kind!r} is not supported: its head is none of {', '.join(HEADS)}; choose another model"
        )
    why_not = "model.packing=padded"
    if not key.padded_only:
        try:
            found, why_not = _compare_packed(twin)
        except Exception as error:  # the library's code does not know packed tokens
            found, why_not = math.nan, f"{kind} cannot be packed ({one_line(error)[:90]})"
        if not why_not:
            return Way(True, f"equal to one text at a time ({found:.1e} on a small {kind})", difference=found)
        twin = build_twin(key.config)
    probe = Probe(VOCABULARY, closing_token(twin.config))
    try:
        probe.measure(twin)
    except Exception as error:
        return Way(False, f"a small {kind} does not run ({one_line(error)})", is_checked=False)
    if probe.effect < _MIN_EFFECT:
        return Way(False, f"a small {kind} gives each text the same reward", is_checked=False)
    found = probe.compare(lambda batch: padded_rewards(twin, batch))
    if not found <= TOLERANCE:
        return _refused(_leak(kind, found))
    return Way(False, f"{why_not}; padded equals one text at a time ({found:.1e})", difference=found)


def _compare_packed(twin: Any) -> tuple[float, str]:
    """The largest difference of packed rewards, and why packing is not exact or not shown to be; "" if it is.

    The check has to see what a wrong mask computes: rewards of the same tokens as a single text must differ.
    """
    kind, probe = twin.config.model_type, Probe(VOCABULARY, closing_token(twin.config), PACKED_TEXTS)
    probe.measure(twin)
    found = probe.compare(lambda batch: packed_by_library(twin, batch))
    if not found <= TOLERANCE:
        return found, f"packed rewards of a small {kind} differ by {found:.2g}"
    seen = probe.compare(lambda batch: packed_rewards(twin, as_one_text(batch), "auto"))
    if probe.effect < _MIN_EFFECT or not seen > TOLERANCE:
        return found, f"rewards of a small {kind} do not show whether packed texts see each other"
    return found, ""


def _leak(kind: str, found: float) -> str:
    return (
        f"rewards of {kind} depend on the padding, and so on the other texts of a batch (by {found:.2g} on two short "
        "texts); choose another model"
    )


def packed_by_library(twin: Any, batch: PackedBatch) -> Tensor:
    """Rewards [R] of packed tokens through the library's layers, whose attention is set to ours."""
    dispatch.install()
    twin.set_attn_implementation(dispatch.NAME)
    return packed_rewards(twin, batch, "auto")


def as_one_text(batch: PackedBatch) -> PackedBatch:
    """The same tokens as a single causal text: what packing computes if each text sees the tokens before it."""
    zeros, total = torch.zeros_like(batch.group), batch.num_tokens
    return replace(
        batch, positions=torch.arange(total), group=zeros, response=zeros, group_lengths=(total,),
        tail_lengths=((total,),),
    )  # fmt: skip


@torch.no_grad()
def check_loaded(network: Any, *, what: str) -> float:
    """Compare padded rewards of a loaded model with one text at a time; returns the largest difference.

    For models without a twin. Raises UserError if they differ, or if the model does not run.
    """
    config, was_training = network.config, network.training
    text_config = config.get_text_config()  # another one in a wrapper of several models
    kind, pads = config.model_type, [getattr(each, "pad_token_id", None) for each in (config, text_config)]
    pad = pads[1]
    tolerance = TOLERANCE if network.dtype == torch.float32 else 0.1
    network.eval()
    try:
        config.pad_token_id = text_config.pad_token_id = pad if isinstance(pad, int) else 0
        probe = Probe(min(VOCABULARY, network.get_input_embeddings().num_embeddings), closing_token(config))
        probe.measure(network)
        found = probe.compare(lambda batch: padded_rewards(network, batch))
    except Exception as error:
        raise UserError(f"{what}: {kind} does not run on token ids and a mask alone ({one_line(error)})") from error
    finally:
        network.train(was_training)
        config.pad_token_id, text_config.pad_token_id = pads
    if not found <= tolerance:
        raise UserError(f"{what}: {_leak(kind, found)}")
    head = head_of(network)
    if probe.effect < 1e-6 and head is not None and any(bool(each.any()) for each in head.parameters()):
        raise UserError(f"{what}: {kind} gives all texts the same reward; choose another model")
    return found


PACKED_TEXTS = ((0, (5,)), (2, (13, 3)))
"""Prefix and responses of each group, in tokens: few, since each length takes a forward pass. One text is longer than
the windows of a twin; after each text comes a shorter one, so that a token before it would be in reach."""
PADDED_TEXTS = ((5, (4, 10)), (0, (13,)), (3, (1, 7)))


class Probe:
    """Short texts of two or three groups, some with a common prefix, and their rewards."""

    def __init__(
        self, vocabulary: int, closing: int | None = None, sizes: Sequence[tuple[int, tuple[int, ...]]] = PADDED_TEXTS
    ) -> None:
        """closing: the last token of each text. sizes: `PACKED_TEXTS` or `PADDED_TEXTS`."""
        draw = np.random.default_rng(0)
        self._groups = [
            TokenGroup(draw.integers(8, vocabulary, prefix).astype(np.int32),
                       [draw.integers(8, vocabulary, tail).astype(np.int32) for tail in tails], ())
            for prefix, tails in sizes
        ]  # fmt: skip
        for group in self._groups if closing is not None else ():
            for tail in group.tails:
                tail[-1] = closing
        self.texts = [[*group.prefix.tolist(), *tail.tolist()] for group in self._groups for tail in group.tails]
        self.wanted = torch.zeros(0)
        self.effect = 0.0
        """The smaller of two differences: between texts, and between a text and the same with one other token."""

    @torch.no_grad()
    def measure(self, network: Any) -> None:
        """The rewards of one text at a time; texts of one length need no padding and take one forward pass."""
        longest = max(range(len(self.texts)), key=lambda number: len(self.texts[number]))
        texts = list(self.texts)
        for place in (1, 4, -6, -3):
            changed = list(self.texts[longest])
            changed[place] = 8 + (changed[place] - 7) % 32
            texts.append(changed)
        found = torch.zeros(len(texts))
        for length in {len(text) for text in texts}:
            numbers = [number for number, text in enumerate(texts) if len(text) == length]
            found[numbers] = text_rewards(network, torch.tensor([texts[number] for number in numbers]))
        self.wanted = found[:-4]
        other = float((found[-4:] - found[longest]).abs().max())
        self.effect = min(float(self.wanted.max() - self.wanted.min()), other)

    @torch.no_grad()
    def compare(self, rewards: Any) -> float:
        """The largest difference of `rewards(batch)`; see `difference`."""
        return self.difference(rewards(self.batch))

    @property
    def batch(self) -> PackedBatch:
        """The texts as one batch."""
        return collate(self._groups)

    def difference(self, found: Tensor) -> float:
        """The largest difference from one text at a time, beyond the size of a reward relative to it; NaN counts."""
        return float(((found - self.wanted).abs() / self.wanted.abs().clamp(min=1)).max())
