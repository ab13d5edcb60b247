"""A causal language model with its output layer, called on PackedBatches: supervised fine-tuning.

The same packed and padded passes as for rewards, through the backbone alone. The output layer is then applied to the
hidden states that predict a target, in chunks (`cross_entropy.py`).

Which way a model runs is decided as in `packing.py`, on a small causal language model of the same configuration: losses
of packed or padded tokens are compared with the library's logits of one text at a time, which also shows whether the
logits are those of the output layer, times a factor, under a soft cap.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rm_gallery.data.batching.packed_batch import PackedBatch, collate
from rm_gallery.data.tokenization.token_group import Span, TokenGroup
from rm_gallery.errors import UserError, one_line
from rm_gallery.modeling.architectures import DECODERS, ENCODERS
from rm_gallery.modeling.attention import dispatch
from rm_gallery.modeling.config import PackingSetting
from rm_gallery.modeling.cross_entropy import TokenLosses, logit_scale, target_losses
from rm_gallery.modeling.decoder_layers import adapt
from rm_gallery.modeling.forward import one_token, packed_hidden, padded_hidden
from rm_gallery.modeling.model_folder import check_values, open_model, warn_of_unread
from rm_gallery.modeling.packing import PACKED_TEXTS, TOLERANCE, ConfigKey, Way, as_one_text
from rm_gallery.modeling.reward_model import LoadedModel, RewardModel
from rm_gallery.modeling.skeleton import wrong_buffers
from rm_gallery.modeling.twin import VOCABULARY, NoTwinError, build_twin

log = logging.getLogger(__name__)

# L targets, T tokens, D hidden, V vocabulary


class LanguageModel(RewardModel):
    """A causal language model of transformers; a batch gives the losses of its targets instead of rewards."""

    is_language_model = True

    def __init__(self, network: Any, way: Way) -> None:
        nn.Module.__init__(self)
        self.network, self.way, self.padded = network, way, not way.packed
        self.attention = "auto"
        self._no_head = nn.Identity()
        self._scale = logit_scale(network.config)
        if way.own_layers:
            adapt(getattr(network, network.base_model_prefix), only_rewards=False)

    @property
    def head(self) -> nn.Module:
        """A module without parameters: the output layer is part of the network, and may be its embedding."""
        return self._no_head

    def forward(self, batch: PackedBatch) -> TokenLosses:  # type: ignore[override]
        """The losses of the L targets; an empty batch computes one token of weight 0."""
        source, target, weight = batch.target_source, batch.target_token, batch.target_weight
        if not batch.num_tokens:
            batch = one_token(batch)
        if not len(source):
            source, target, weight = (each.new_zeros(1) for each in (source, target, weight))
        if self.padded:
            hidden = padded_hidden(self.network, batch, source)
        else:
            layout = dispatch.lay_out(batch, self.attention)
            hidden = packed_hidden(self.network, batch, layout).index_select(0, source)
        layer = self.network.get_output_embeddings()
        found = target_losses(hidden, layer.weight, getattr(layer, "bias", None), target, weight, self._scale)
        count = len(batch.target_source)
        # A clone, since FSDP2 registers its backward hooks on the outputs.
        return TokenLosses(found.total.clone(), found.each[:count], found.correct[:count])


def language_model_way(config: Any, setting: PackingSetting, *, what: str) -> Way:
    """The way to run the causal language model of a configuration; see `packing.choose_way`.

    Raises UserError for encoders, and for a type whose losses are exact in no way.
    """
    kind = config.model_type
    why = None
    if kind in ENCODERS or getattr(config, "use_bidirectional_attention", None):
        why = "it attends in both directions, so it predicts no next token"
    elif getattr(config, "is_encoder_decoder", False):
        why = "it is an encoder-decoder"
    if why is not None:
        raise UserError(f"{what}: it has to be a causal language model, and {kind} is none: {why}")
    if kind in DECODERS:
        if setting == "padded":
            return Way(False, "model.packing=padded")
        return Way(True, f"{kind} is a decoder that is tested packed", own_layers=True)
    way = _tried(ConfigKey(config, setting == "padded"))
    if isinstance(way, str):
        raise UserError(f"{what}: {kind} cannot be trained as a language model: {way}; choose another model")
    if setting == "packed" and not way.packed:
        raise UserError(f"{what}: model.packing=packed is not possible ({way.reason}); set auto")
    return way


@functools.lru_cache(maxsize=256)
def _tried(key: ConfigKey) -> Way | str:
    """The first way whose losses equal the library's on a twin; a sentence if none does."""
    kind, why_not = key.config.model_type, "model.packing=padded"
    for packed in (False,) if key.padded_only else (True, False):
        try:
            twin = build_twin(key.config, language_model=True)
        except NoTwinError as error:
            return f"no small {kind} can be built to compare its losses ({one_line(error)})"
        way = "packed" if packed else "padded"
        try:
            found, seen = _difference(twin, packed=packed)
        except Exception as error:  # the library's code does not know packed tokens
            why_not = f"{kind} cannot be {way} ({one_line(error)[:90]})"
            continue
        if found <= TOLERANCE < seen:
            reason = "" if packed else f"{why_not}; padded "
            return Way(packed, f"{reason}equal to one text at a time ({found:.1e} on a small {kind})", difference=found)
        why_not = f"{way} losses of a small {kind} differ by {found:.2g} from those of transformers"
    return why_not


@torch.no_grad()
def _difference(twin: Any, *, packed: bool) -> tuple[float, float]:
    """The largest difference of our losses from the library's, and of the losses if texts saw each other."""
    groups = probe_texts()
    batch, expected = collate(groups), library_losses(twin, groups)
    model = model_of_twin(twin, packed=packed)
    difference = float((model(batch).each - expected).abs().max())
    if not packed:
        return difference, float("inf")
    return difference, float((model(as_one_text(batch)).each - expected).abs().max())


def probe_texts() -> list[TokenGroup]:
    """Texts of random tokens, some with a common prefix; every token but the first is a target."""
    draw, groups = np.random.default_rng(0), []
    for prefix, tails in PACKED_TEXTS:
        head, *rest = (draw.integers(8, VOCABULARY, size).astype(np.int32) for size in (prefix, *tails))
        spans = [Span(number, 1, prefix + len(tail)) for number, tail in enumerate(rest)]
        groups.append(TokenGroup(head, rest, (), spans=[each for each in spans if each.first < each.last]))
    return groups


def model_of_twin(twin: Any, *, packed: bool) -> LanguageModel:
    """A twin that is a causal language model, as it runs in training."""
    if packed:
        dispatch.install()
        twin.set_attn_implementation(dispatch.NAME)
    return LanguageModel(twin, Way(packed, ""))


@torch.no_grad()
def library_losses(twin: Any, groups: list[TokenGroup]) -> Tensor:
    """[L] losses of the targets of `probe_texts` by the library, one text at a time, as `PackedBatch` orders them."""
    wanted, start = {}, 0
    for group in groups:
        prefix = len(group.prefix)
        tail_start = start + prefix
        for tail in group.tails:
            text = torch.from_numpy(np.concatenate([group.prefix, tail]).astype(np.int64))
            losses = -twin(input_ids=text[None], use_cache=False).logits[0].float().log_softmax(-1)
            for place in range(1, len(text)):
                at = place - 1
                source = start + at if at < prefix else tail_start + at - prefix
                wanted[source, int(text[place])] = float(losses[at, text[place]])
            tail_start += len(tail)
        start = tail_start
    batch = collate(groups)
    pairs = zip(batch.target_source.tolist(), batch.target_token.tolist(), strict=True)
    return torch.tensor([wanted[pair] for pair in pairs])


def load_language_model(
    path: str, *, key: str = "model.partial_pretrain", trust_remote_code: bool = False, dropout: float = 0.0,
    packing: PackingSetting = "auto",
) -> LoadedModel:  # fmt: skip
    """Load a causal language model, of a wrapper of several models its text model, in float32 on the CPU.

    Raises UserError as `load_reward_model` does, and for a folder without the output layer.
    """
    from transformers import AutoModelForCausalLM

    source = open_model(
        path, key=key, trust_remote_code=trust_remote_code, dropout=dropout, new_head=True, packing=packing,
        choose=language_model_way,
    )  # fmt: skip
    network, info = source.read(AutoModelForCausalLM, torch.float32, trust_remote_code)
    source.check_shapes(info["mismatched_keys"])
    tied = getattr(network, "all_tied_weights_keys", None) or {}
    missing = sorted(name for name in info["missing_keys"] if name not in tied)
    place = {parameter: name for name, parameter in network.named_parameters()}
    output = place[network.get_output_embeddings().weight]
    if output in missing:
        raise UserError(
            f"{source.what}: the folder has no output layer of a language model ({output}), as a reward model has "
            "none; start from a language model"
        )
    if missing:
        raise UserError(
            f"{source.what}: the weights lack {len(missing)} tensors (first: {missing[0]}); is the download complete?"
        )
    unread = [name for name in info["unexpected_keys"] if not source.wrapper or name in source.files.tensors]
    warn_of_unread(source.what, sorted(unread), source.files.other_files)
    check_values(network.named_parameters(), source.what)
    if not source.way.own_layers and not trust_remote_code and (lost := wrong_buffers(network)):
        raise UserError(
            f"{source.what}: transformers does not initialize {lost[0]} when it loads {source.config.model_type}, so "
            "losses would be wrong; choose another model"
        )
    return LoadedModel(LanguageModel(network, source.way), wrapper=source.wrapper, renames=source.renames)


def text_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """[T - 1] losses of the tokens of a text after the first. logits: [T, V]; ids: [T]."""
    return nn.functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="none")
