"""Encoding: every whole text of a group (prompt and response) as token ids, the same ids that a server computes.

Each whole text is tokenized on its own; the common prefix is found later, on tokens. Does not load torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from rm_gallery.data.tokenization.special_tokens import ControlTokens
from rm_gallery.data.tokenization.tokenizer import TokenizeConfig, fit_length, too_long
from rm_gallery.errors import BadRow, UserError, one_line
from rm_gallery.schema import Comparison, PreferenceGroup

Render: TypeAlias = Callable[..., str]
"""`render(prompt messages, response messages, where="file:row")` -> the whole text, in place of the chat template."""


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
    Control tokens in message contents are tokenized as plain text. Raw texts get the special tokens that the
    tokenizer adds, without a second BOS; `text_special_tokens` says whether control tokens in them are parsed.
    """

    def __init__(self, tokenizer: Any, config: TokenizeConfig, *, render: Render | None = None) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.control = ControlTokens(tokenizer)
        self._render = render
        self._backend = _own_backend(tokenizer)
        self._bos, self._cls = tokenizer.bos_token or "", tokenizer.cls_token or ""
        self._eos = tokenizer.eos_token or tokenizer.sep_token or ""

    def encode(self, group: PreferenceGroup) -> list[list[int]]:
        """Token ids of each whole text of one group; raises the BadRow that `encode_many` returns."""
        [found] = self.encode_many([group])
        if isinstance(found, BadRow):
            raise found
        return found

    def encode_many(self, groups: Sequence[PreferenceGroup]) -> list[list[list[int]] | BadRow]:
        """Token ids of every whole text, as `[group][response]`, before the length policy.

        A group that cannot be rendered is replaced by a BadRow with the reason.
        Raises UserError if there is no chat template or it is not valid.
        """
        batches = {False: _Batch(), True: _Batch()}  # by whether the tokenizer adds its special tokens
        found: list[list[list[int]] | BadRow] = []
        for group in groups:
            try:
                found.append(self._encode_group(group, batches))
            except BadRow as error:
                found.append(error)
        for adds, batch in batches.items():
            batch.fill(self._encode_texts(batch.texts, adds))
        return found

    def _encode_group(self, group: PreferenceGroup, batches: dict[bool, _Batch]) -> list[list[int]]:
        """Ids of texts with control tokens; the other texts are added to a batch, which fills in their ids later."""
        hidden = group.style == "chat" and self.control.occur_in(_contents(group))
        texts: list[list[int]] = []
        for text in self._render_group(group, hidden):
            self._check_start(text)
            adds = self._adds_special_tokens(text, group)
            if hidden:
                texts.append(self.control.encode_rendered(text, add_special_tokens=adds))
            elif self._is_plain(group) and self.control.occur_in(text):
                texts.append(self._encode_plain(text))
            else:
                batches[adds].add(text, texts)
                texts.append([])
        return texts

    def fit(self, texts: list[list[int]], group: PreferenceGroup) -> tuple[list[list[int]], Sequence[Comparison]]:
        """Apply the length policy of the configuration; see `fit_length`."""
        return fit_length(texts, group, self.tokenizer, self.config)

    def render(self, group: PreferenceGroup) -> list[str]:
        """The K whole texts of a group, without special tokens that the tokenizer adds."""
        hidden = group.style == "chat" and self.control.occur_in(_contents(group))
        return [self.control.show(text) for text in self._render_group(group, hidden)]

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

    def _is_plain(self, group: PreferenceGroup) -> bool:
        return group.style == "text" and self.config.text_special_tokens == "plain"

    def _adds_special_tokens(self, text: str, group: PreferenceGroup) -> bool:
        if group.style == "chat":
            return bool(self._cls) and not text.startswith(self._cls)
        return self._is_plain(group) or not (self._bos and text.startswith(self._bos))

    def _encode_plain(self, text: str) -> list[int]:
        """Ids of a raw text with its control tokens as plain text, except the EOS that `append_eos` wrote."""
        if self.config.append_eos and text.endswith(self._eos):
            ids = self.control.encode_plain(text.removesuffix(self._eos), add_special_tokens=True)
            return [*ids, self.tokenizer.convert_tokens_to_ids(self._eos)]
        return self.control.encode_plain(text, add_special_tokens=True)

    def _encode_texts(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        if self._backend is not None:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in encodings]
        return _library_ids(self.tokenizer, texts, add_special_tokens)

    def _render_group(self, group: PreferenceGroup, hidden: bool) -> list[str]:
        texts = self._render_texts(group) if group.style == "text" else self._render_chats(group, hidden)
        try:
            for text in texts:
                text.encode()
        except UnicodeEncodeError:  # valid in JSON
            raise BadRow("text with a lone surrogate") from None
        return texts

    def _render_texts(self, group: PreferenceGroup) -> list[str]:
        assert isinstance(group.prompt, str)
        texts = [f"{group.prompt}{response}" for response in group.responses]
        return [text + self._eos if self.config.append_eos and not text.endswith(self._eos) else text for text in texts]

    def _render_chats(self, group: PreferenceGroup, hidden: bool) -> list[str]:
        from jinja2 import TemplateSyntaxError

        if self._render is None and self.tokenizer.chat_template is None:
            raise UserError(
                f"{group.where}: the data are chat messages but the tokenizer has no chat template; "
                "set data.chat_template, or use raw texts"
            )
        contents = (group.prompt, group.responses, group.metadata.get("tools"))
        prompt, responses, tools = self.control.hide(contents) if hidden else contents
        assert not isinstance(prompt, str)
        try:
            if self._render is not None:
                return [self._render(prompt, response, where=group.where) for response in responses]
            template = self.tokenizer.apply_chat_template
            return [template([*prompt, *response], tools=tools, tokenize=False) for response in responses]
        except UserError:
            raise
        except TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is not valid Jinja (line {error.lineno}: {error.message}); "
                "fix it, or set data.chat_template to another"
            ) from error
        except (Exception, RecursionError) as error:
            # Templates raise jinja exceptions or plain TypeErrors; either way this row does not fit the template.
            raise BadRow(f"chat template rejects the conversation: {one_line(error)}") from error


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


def _contents(group: PreferenceGroup) -> list[Any]:
    return [group.prompt, group.responses, group.metadata.get("tools")]


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
