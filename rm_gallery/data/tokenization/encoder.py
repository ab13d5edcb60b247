"""Encoding: every whole text of a group (prompt and response) as token ids, the same ids that a server computes.

Each whole text is tokenized on its own; the common prefix is found later, on tokens. Does not load torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

from rm_gallery.data.tokenization.assistant_spans import AssistantSpans, Bounds, tokens_of
from rm_gallery.data.tokenization.chats import Chat, ChatRenderer, Render
from rm_gallery.data.tokenization.guarded import GuardedChats
from rm_gallery.data.tokenization.special_tokens import ControlTokens
from rm_gallery.data.tokenization.tokenizer import TokenizeConfig, check_closing, fit_length, too_long
from rm_gallery.data.tokenization.turn_tokens import added_controls, turn_tokens
from rm_gallery.errors import BadRow
from rm_gallery.schema import Comparison, PreferenceGroup


class GroupEncoder(Protocol):
    """Turns groups into token ids."""

    def encode_many(self, groups: Sequence[PreferenceGroup]) -> list[list[list[int]] | BadRow]:
        """Ids of every whole text, as `[group][response]`; a BadRow in place of a group that cannot be rendered."""
        ...

    def fit(self, texts: list[list[int]], group: PreferenceGroup) -> tuple[list[list[int]], Sequence[Comparison]]:
        """Apply the length policy: the texts, and the comparisons whose sides still differ; see `fit_length`."""
        ...


_START_TOKENS = 1024
"""Shorter starts are not compared with `max_length`: tokens next to the cut would count."""


class Encoder:
    """Encodes groups with one tokenizer and one configuration. Not thread-safe.

    Chats are rendered by the chat template, which writes the special tokens; only the CLS token of encoders is added.
    If no content holds a control token, the ids are those of `apply_chat_template`; control tokens in contents are
    tokenized as plain text. Raw texts get the special tokens that the tokenizer adds, without a second BOS;
    `text_special_tokens` says whether control tokens in them are parsed.
    """

    def __init__(self, tokenizer: Any, config: TokenizeConfig, *, render: Render | None = None) -> None:
        self.tokenizer, self.config = tokenizer, config
        self._renderer = ChatRenderer(tokenizer, render)
        self._backend = _own_backend(tokenizer)
        self._bos, self._cls = tokenizer.bos_token or "", tokenizer.cls_token or ""
        self._eos = tokenizer.eos_token or tokenizer.sep_token or ""

    @cached_property
    def control(self) -> ControlTokens:
        """Control tokens of chats."""
        return ControlTokens(self.tokenizer, turn_tokens(self.tokenizer, self._renderer.try_messages))

    @cached_property
    def _raw_control(self) -> ControlTokens:
        """Control tokens of raw texts."""
        return ControlTokens(self.tokenizer, added_controls(self.tokenizer, self.control.texts))

    @cached_property
    def _guarded(self) -> GuardedChats:
        return GuardedChats(self._renderer, self.control, self._encode_chat)

    def encode(self, group: PreferenceGroup) -> list[list[int]]:
        """Token ids of each whole text of one group; raises the BadRow that `encode_many` returns."""
        [found] = self.encode_many([group])
        if isinstance(found, BadRow):
            raise found
        return found

    def encode_many(self, groups: Sequence[PreferenceGroup]) -> list[list[list[int]] | BadRow]:
        """Token ids of every whole text, as `[group][response]`, before the length policy.

        A group that cannot be rendered is replaced by a BadRow with the reason.
        Raises UserError if there is no chat template, if it is not valid, or if it runs for too long.
        """
        batches = {False: _Batch(), True: _Batch()}  # by whether the tokenizer adds its special tokens
        found: list[list[list[int]] | BadRow] = []
        chats: list[tuple[int, list[tuple[Chat, str]]]] = []
        for index, group in enumerate(groups):
            try:
                if group.style == "text":
                    found.append(self._encode_texts_of(group, batches))
                else:
                    found.append(self._encode_chats_of(group, batches, chats, index))
            except BadRow as error:
                found.append(error)
        for adds, batch in batches.items():
            batch.fill(self._encode_texts(batch.texts, adds))
        for index, rendered in chats:
            try:
                texts = found[index]
                assert not isinstance(texts, BadRow)
                found[index] = self._guarded.checked(texts, rendered, groups[index].where)
            except BadRow as error:
                found[index] = error
        return [each if isinstance(each, BadRow) else self._with_closing(each) for each in found]

    def _with_closing(self, texts: list[list[int]]) -> list[list[int]] | BadRow:
        try:
            check_closing(texts, self.tokenizer)
        except BadRow as error:
            return error
        return texts

    def _encode_texts_of(self, group: PreferenceGroup, batches: dict[bool, _Batch]) -> list[list[int]]:
        """Ids of raw texts with control tokens that are plain text; the others are added to a batch."""
        texts: list[list[int]] = []
        plain = self.config.text_special_tokens == "plain"
        for text in _encodable(self._raw_texts(group)):
            self._check_start(text)
            if plain and self._raw_control.occur_in(text):
                texts.append(self._encode_plain(text))
            else:
                batches[plain or not (self._bos and text.startswith(self._bos))].add(text, texts)
                texts.append([])
        return texts

    def _encode_chats_of(
        self, group: PreferenceGroup, batches: dict[bool, _Batch], chats: list[Any], index: int
    ) -> list[list[int]]:
        """Ids of chats with control tokens in contents; the others are added to a batch, whose ids are checked."""
        if not group.responses:  # of an input to score
            return []
        rendered = self._guarded.rendered(group)
        for text in _encodable([text for _, text in rendered or ()]):
            self._check_start(text)
        if rendered is None or self.control.occur_in(
            [rendered[0][0].prompt, rendered[0][0].tools, [chat.response for chat, _ in rendered]]
        ):
            return self._guarded.encode(group, rendered)
        texts: list[list[int]] = []
        for _, text in rendered:
            batches[self._adds_cls(text)].add(text, texts)
            texts.append([])
        chats.append((index, rendered))
        return texts

    def spans(self, texts: list[list[int]], group: PreferenceGroup) -> list[Bounds]:
        """Target tokens of each whole text: its assistant turns, of preferences those of preferred responses alone.

        texts: the ids from `encode_many`. Raises BadRow where they are not found exactly.
        """
        chosen = self.config.lm_targets == "chosen"
        wanted = {each.better for each in group.comparisons} if chosen else set(range(len(texts)))
        if group.style == "text":
            assert isinstance(group.prompt, str)
            start = len(group.prompt)
            whole = self._raw_texts(group)
            return [
                tokens_of(text, [(start, len(text))], ids, self._encode_raw) if place in wanted else []
                for place, (text, ids) in enumerate(zip(whole, texts, strict=True))
            ]
        rendered = self._renderer.render_group(group)
        return [
            self._assistant.find(chat, text, ids, self._with_offsets, only_response=chosen) if place in wanted else []
            for place, ((chat, text), ids) in enumerate(zip(rendered, texts, strict=True))
        ]

    def response_starts(self, texts: list[list[int]], group: PreferenceGroup) -> list[int | None]:
        """The first token of the response in each whole text; None where it is not found exactly.

        texts: the ids from `encode_many`.
        """
        found: list[int | None] = []
        for place, ids in enumerate(texts):
            try:
                spans = self._response_spans(replace(group, responses=[group.responses[place]]), ids)
            except (BadRow, IndexError):
                spans = []
            found.append(spans[0][0] if spans else None)
        return found

    def _response_spans(self, group: PreferenceGroup, ids: list[int]) -> Bounds:
        """Of a group with one response."""
        if group.style == "text":
            [text] = self._raw_texts(group)
            return tokens_of(text, [(len(group.prompt), len(text))], ids, self._encode_raw)
        [(chat, text)] = self._renderer.render_group(group)
        return self._assistant.find(chat, text, ids, self._with_offsets, only_response=True)

    @cached_property
    def _assistant(self) -> AssistantSpans:
        return AssistantSpans(self.tokenizer, self._renderer, self.control)

    def _encode_raw(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        plain = self.config.text_special_tokens == "plain"
        if plain and self._raw_control.occur_in(text):
            return self._plain_with_offsets(text)
        return self._with_offsets(text, adds=plain or not (self._bos and text.startswith(self._bos)))

    def _with_offsets(self, text: str, *, adds: bool | None = None) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text, and the characters of each."""
        adds = self._adds_cls(text) if adds is None else adds
        if self._backend is not None:
            found = self._backend.encode(text, add_special_tokens=adds)
            return found.ids, found.offsets
        encoded = self.tokenizer(text, add_special_tokens=adds, return_offsets_mapping=True, verbose=False)
        return list(encoded["input_ids"]), list(encoded["offset_mapping"])

    def fit(self, texts: list[list[int]], group: PreferenceGroup) -> tuple[list[list[int]], Sequence[Comparison]]:
        """Apply the length policy of the configuration; see `fit_length`."""
        return fit_length(texts, group, self.tokenizer, self.config)

    def encode_rendered(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that hold their special tokens. Raises BadRow for one that has no UTF-8 form."""
        return self._encode_texts(_encodable(list(texts)), False)

    def render(self, group: PreferenceGroup) -> list[str]:
        """The K whole texts of a group, without special tokens that the tokenizer adds."""
        if group.style == "text":
            return self._raw_texts(group)
        return [text for _, text in self._renderer.render_group(group)]

    def _check_start(self, text: str) -> None:
        """Raise BadRow for a text that the length policy will drop, from the tokens of its start alone.

        The tokenizer library takes about 150 times the size of a long text. A cut changes tokens only next to it, so
        twice as many tokens as allowed are sure to be too many.
        """
        enough = 2 * max(self.config.max_length, _START_TOKENS)
        start = text[: 8 * enough]  # twice as many tokens as needed in most languages
        if not self.config.filter_overlong_prompts or len(text) < 2 * len(start):
            return
        if len(self._encode_texts([start], False)[0]) > enough:
            raise BadRow(too_long(self.config))

    def _adds_cls(self, text: str) -> bool:
        return bool(self._cls) and not text.startswith(self._cls)

    def _encode_chat(self, text: str, *, hidden: bool) -> list[int]:
        """Ids of one rendered text. hidden: it has placeholders of `control`."""
        adds = self._adds_cls(text)
        [text] = _encodable([text])
        if hidden:
            return self.control.encode_rendered(text, add_special_tokens=adds)
        return self._encode_texts([text], adds)[0]

    def _encode_plain(self, text: str) -> list[int]:
        """Ids of a raw text with its control tokens as plain text, except the EOS that `append_eos` wrote."""
        return self._plain_with_offsets(text)[0]

    def _plain_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The same, and the characters of each token."""
        if not (self.config.append_eos and text.endswith(self._eos)):
            return self._raw_control.plain_tokens(text, add_special_tokens=True)
        start = len(text) - len(self._eos)
        ids, offsets = self._raw_control.plain_tokens(text[:start], add_special_tokens=True)
        return [*ids, self.tokenizer.convert_tokens_to_ids(self._eos)], [*offsets, (start, len(text))]

    def _encode_texts(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        if self._backend is not None:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in encodings]
        return _library_ids(self.tokenizer, texts, add_special_tokens)

    def _raw_texts(self, group: PreferenceGroup) -> list[str]:
        assert isinstance(group.prompt, str)
        texts = [f"{group.prompt}{response}" for response in group.responses]
        return [text + self._eos if self.config.append_eos and not text.endswith(self._eos) else text for text in texts]


def _encodable(texts: list[str]) -> list[str]:
    """The texts; raises BadRow for one that has no UTF-8 form."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:  # valid in JSON
        raise BadRow("text with a lone surrogate") from None
    return texts


class _Batch:
    """Texts to tokenize in one call, and the destinations of their ids."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._places: list[tuple[list[list[int]], int]] = []

    def add(self, text: str, target: list[list[int]]) -> None:
        """Queue a text whose ids will be the next item of `target`."""
        self.texts.append(text)
        self._places.append((target, len(target)))

    def fill(self, ids: list[list[int]]) -> None:
        for (target, place), each in zip(self._places, ids, strict=True):
            target[place] = each


def _library_ids(tokenizer: Any, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    # verbose=False: no warning about texts longer than the model; the length policy follows.
    encoded = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"]


_PROBES = ["", " a", "A b\n c", "\u00e9\U0001f600 1234  x", "a</s><s> [SEP] <|im_end|>\n", "x " * 3000]


def _own_backend(tokenizer: Any) -> Any:
    """The Rust tokenizer without its Python wrapper, twice as fast; None if the wrapper changes the ids of probes."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    for adds in (True, False):
        ids = [each.ids for each in backend.encode_batch_fast(_PROBES, add_special_tokens=adds)]
        if ids != _library_ids(tokenizer, _PROBES, adds):
            return None
    return backend
