"""Protocols of reward servers: what a request is, where the reward is in the answer, and which one a server speaks.

    vllm           POST /classify         token ids, texts, or one conversation (of RM-Gallery's server, many)
    vllm-pooling   POST /pooling          the same
    sglang         POST /v1/embeddings    token ids or texts
    openrlhf       POST /get_reward       texts with their special tokens

`/v1/classify` of SGLang is not used: it applies a softmax over the one label, so that every reward is 1. vLLM applies a
sigmoid unless a request turns it off, in a field whose name depends on the version. Only the field that the server
describes is sent: versions that know `use_activation` read any value of the older names as true.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from rm_gallery.errors import UserError, nearest
from rm_gallery.schema import Message


@dataclass(frozen=True)
class Chat:
    """A conversation that the server renders."""

    prompt: Sequence[Message]
    response: Sequence[Message]
    tools: Any = None

    @property
    def messages(self) -> list[Message]:
        """All turns."""
        return [*self.prompt, *self.response]


Input: TypeAlias = str | list[int] | Chat
"""A text, its token ids, or a conversation."""
Get: TypeAlias = Callable[[str], Any]
"""The JSON at a path of the server; None if it has none there."""

MAX_TEXTS, MAX_SIZE = 32, 200_000  # of a request; the size is in characters or tokens
_FLAGS = ("use_activation", "activation", "softmax")  # newest first
_OURS = "rm-gallery"


class RefusedText(ValueError):
    """The request itself cannot be scored."""


@dataclass(frozen=True)
class Protocol:
    """The shape of requests and answers."""

    name: str
    path: str
    title: str
    rows: str
    """Key of the list of results."""
    value: str | None
    """Key of the numbers of a result; None if a result is a number."""
    takes: Literal["tokens", "text"] = "tokens"
    renders: bool = False
    """Whether the server renders conversations."""
    extra: tuple[tuple[str, Any], ...] = ()


PROTOCOLS = {
    each.name: each
    for each in (
        Protocol("vllm", "/classify", "/classify of vLLM", "data", "probs", renders=True),
        Protocol(
            "vllm-pooling", "/pooling", "/pooling of vLLM", "data", "data", renders=True, extra=(("task", "classify"),)
        ),
        Protocol("sglang", "/v1/embeddings", "/v1/embeddings of SGLang", "data", "embedding"),
        Protocol("openrlhf", "/get_reward", "/get_reward of OpenRLHF", "rewards", None, takes="text"),
    )
}


@dataclass(frozen=True)
class Served:
    """What an endpoint serves."""

    protocol: Protocol
    model: str | None
    """Name in requests; None for a server without names."""
    flag: str | None = None
    """Field that turns the activation off; None if there is none."""
    activation: Literal["off", "on", "unknown"] = "off"
    """Whether the answers went through a sigmoid or softmax, by the server's own description."""
    batches_chats: bool = False
    """Whether a request may have several conversations, or several responses to a prompt, and tools: our server."""


@dataclass
class Batch:
    """What one request asks for."""

    inputs: list[Input] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """Of the inputs among all of a call."""
    shares_prompt: bool = False
    """Whether the inputs are responses to one prompt, which the request has once."""
    size: int = 0

    def halves(self) -> tuple[Batch, Batch]:
        """Two requests for the same."""
        half = len(self.inputs) // 2
        return (
            Batch(self.inputs[:half], self.places[:half], self.shares_prompt),
            Batch(self.inputs[half:], self.places[half:], self.shares_prompt),
        )


def batches_of(served: Served, groups: Iterable[Sequence[Input]]) -> list[Batch]:
    """The requests for groups of inputs, each input in one, within MAX_TEXTS and MAX_SIZE.

    Inputs of one kind, and conversations with the same tools, share requests wherever they are in the call. A group of
    responses that is too large with its prompt before each of them has a request of its own, with the prompt once.
    """
    found: list[Batch] = []
    last: dict[str, Batch] = {}
    place = 0
    for number, inputs in enumerate(groups):
        sizes = [_size(each) for each in inputs]
        shares = served.batches_chats and sum(sizes) > MAX_SIZE and len(inputs) > 1 and all(map(_is_answer, inputs))
        for each, size in zip(inputs, sizes, strict=True):
            key, size = (f"{number}", len(str(each.response))) if shares else (_kind(each), size)  # type: ignore[union-attr]
            most = 1 if isinstance(each, Chat) and not served.batches_chats else MAX_TEXTS
            batch = last.get(key)
            if batch is None or len(batch.inputs) >= most or batch.size + size > MAX_SIZE:
                batch = last[key] = Batch(shares_prompt=shares)
                found.append(batch)
            batch.inputs.append(each)
            batch.places.append(place)
            batch.size += size
            place += 1
    return found


def _size(item: Input) -> int:
    return len(str(item.messages)) if isinstance(item, Chat) else len(item)


def _kind(item: Input) -> str:
    return f"chat {json.dumps(item.tools)}" if isinstance(item, Chat) else type(item).__name__


def _is_answer(item: Input) -> bool:
    """Whether a response is one turn that no server takes for a repetition of the prompt."""
    if not isinstance(item, Chat) or not item.prompt or len(item.response) != 1:
        return False
    return item.response[0].get("role") == "assistant" and item.prompt[-1].get("role") != "assistant"


def find_protocol(name: str) -> Protocol | None:
    """The protocol of a name, None for `auto`. Raises UserError for any other."""
    if name == "auto":
        return None
    if name not in PROTOCOLS:
        hint = nearest(name, PROTOCOLS)
        raise UserError(f"protocol={name}: must be auto, {', '.join(PROTOCOLS)}.{hint}")
    return PROTOCOLS[name]


def discover(url: str, get: Get, protocol: Protocol | None, model: str | None) -> Served:
    """What the server at `url` serves, by what it says of itself; no text is sent.

    Raises UserError if it does not say which protocol it speaks, does not serve the model, or serves several.
    """
    listed, api = get("/v1/models"), get("/openapi.json")
    cards = [each for each in _items(listed, "data") if isinstance(each, Mapping)]
    paths = api.get("paths") if isinstance(api, Mapping) else None
    paths = paths if isinstance(paths, Mapping) else {}
    if protocol is None:
        protocol = _guess({str(card.get("owned_by")).lower() for card in cards}, paths)
    if protocol is None:
        known = ", ".join(map(repr, PROTOCOLS))
        raise UserError(
            f"{url}: the server does not say which protocol it speaks (/v1/models and /openapi.json); pass protocol= "
            f"one of {known}, on the command line e.g. --model vllm:{url}"
        )
    if protocol.value is None:
        return Served(protocol, None)
    names = [str(card["id"]) for card in cards if card.get("id")]
    if model is None and len(names) > 1:
        raise UserError(
            f"{url}: the server has several models ({', '.join(names[:10])}); pass model=, on the command line "
            f"--model {url}#{names[0]}"
        )
    if model is not None and names and model not in names:
        raise UserError(f"{url}: no model {model!r}; the server has {', '.join(names[:10])}.{nearest(model, names)}")
    model = model if model is not None else names[0] if names else None
    if not protocol.renders:
        return Served(protocol, model)
    fields = _fields(paths.get(protocol.path), api) if paths.get(protocol.path) else set()
    flag = next((name for name in _FLAGS if name in fields), None)
    is_ours = any(card.get("owned_by") == _OURS for card in cards)
    if flag is None and "input" in fields:
        return Served(protocol, model, None, "on", is_ours)
    return Served(protocol, model, flag or _FLAGS[0], "off" if flag else "unknown", is_ours)


def _guess(owners: set[str], paths: Mapping[str, Any]) -> Protocol | None:
    if "sglang" in owners:
        return PROTOCOLS["sglang"]
    for name in ("vllm", "vllm-pooling", "openrlhf"):
        if PROTOCOLS[name].path in paths:
            return PROTOCOLS[name]
    return PROTOCOLS["vllm"] if "vllm" in owners else None


def _fields(operation: Any, api: Any) -> set[str]:
    """Names of the fields that a request may have, by the server's OpenAPI description."""
    components = api.get("components") or {}
    schemas: Mapping[str, Any] = components.get("schemas") or {}
    found: set[str] = set()
    seen: set[str] = set()

    def visit(value: Any) -> None:
        if isinstance(value, Mapping):
            found.update(value["properties"] if isinstance(value.get("properties"), Mapping) else ())
            name = str(value.get("$ref", "")).rpartition("/")[2]
            if name and name not in seen:
                seen.add(name)
                visit(schemas.get(name))
            for key, item in value.items():
                if key != "properties":
                    visit(item)
        elif isinstance(value, list):
            for item in value:
                visit(item)

    post = operation.get("post") if isinstance(operation, Mapping) else None
    visit(post.get("requestBody") if isinstance(post, Mapping) else None)
    return found


def request_of(served: Served, batch: Batch) -> dict[str, Any]:
    """The body of a request. Raises RefusedText for conversations that this server does not take in this form."""
    inputs = batch.inputs
    if served.protocol.value is None:
        return {"query": inputs}
    body: dict[str, Any] = {"model": served.model} if served.model is not None else {}
    chats = [each for each in inputs if isinstance(each, Chat)]
    if not chats:
        body["input"] = inputs
    elif served.batches_chats and batch.shares_prompt:
        body |= {"messages": chats[0].prompt, "responses": [each.response for each in chats]}
    elif served.batches_chats:
        body["messages"] = [each.messages for each in chats]
    elif len(chats) > 1:  # of several servers, one with a smaller interface
        raise RefusedText("the server takes one conversation at a time")
    else:
        body |= {"messages": chats[0].messages, "add_generation_prompt": False}
    if chats and chats[0].tools:
        if not served.batches_chats:
            raise RefusedText("tools, which the server does not take: pass tokenizer= (evaluate: --tokenizer)")
        body["tools"] = chats[0].tools
    if served.flag is not None:
        body[served.flag] = False
    return {**body, **dict(served.protocol.extra)}


def rewards_of(served: Served, answer: Any, count: int) -> list[float]:
    """The rewards of an answer, in the order of the request. null is NaN. Raises UserError for any other shape."""
    protocol = served.protocol
    rows = _items(answer, protocol.rows)
    if not isinstance(answer, Mapping) or protocol.rows not in answer or len(rows) != count:
        found = f"{len(rows)} results" if rows else f"no list {protocol.rows!r}"
        raise UserError(f"an answer with {found} for {count} texts, which is not {protocol.title}; pass protocol=")
    if protocol.value is None:
        return [_number(row, protocol) for row in rows]
    if not all(isinstance(row, Mapping) and protocol.value in row for row in rows):
        raise UserError(f"results without {protocol.value!r}, which is not {protocol.title}; pass protocol=")
    places = [row.get("index", number) for number, row in enumerate(rows)]
    if sorted(map(str, places)) != sorted(map(str, range(count))):
        raise UserError(f"results whose index is not 0 to {count - 1}: no order of rewards")
    values = {int(place): row[protocol.value] for place, row in zip(places, rows, strict=True)}
    return [_number(values[place], protocol) for place in range(count)]


def _number(value: Any, protocol: Protocol) -> float:
    if isinstance(value, list):
        if len(value) != 1:
            raise UserError(
                f"{len(value)} numbers for a text: the model behind {protocol.title} is not a reward model with one "
                "label"
            )
        [value] = value
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"a {type(value).__name__} in place of a reward, which is not {protocol.title}")
    return float(value)


def _items(value: Any, key: str) -> list[Any]:
    found = value.get(key) if isinstance(value, Mapping) else None
    return found if isinstance(found, list) else []
