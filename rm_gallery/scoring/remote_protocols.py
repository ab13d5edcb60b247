"""Protocols of reward servers: what a request is, where the reward is in the answer, and which one a server speaks.

    vllm           POST /classify         token ids, texts, or one conversation (also the server of RM-Gallery)
    vllm-pooling   POST /pooling          the same
    sglang         POST /v1/embeddings    token ids or texts
    openrlhf       POST /get_reward       texts with their special tokens

`/v1/classify` of SGLang is not used: it applies a softmax over the one label, so that every reward is 1. vLLM applies a
sigmoid unless a request turns it off, in a field whose name depends on the version. Only the field that the server
describes is sent: versions that know `use_activation` read any value of the older names as true.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from rm_gallery.errors import UserError, nearest
from rm_gallery.schema import Message

Input: TypeAlias = str | list[int] | list[Message]
"""A text, its token ids, or a conversation that the server renders."""
Get: TypeAlias = Callable[[str], Any]
"""The JSON at a path of the server; None if it has none there."""

_FLAGS = ("use_activation", "activation", "softmax")  # newest first


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
    if flag is None and "input" in fields:
        return Served(protocol, model, None, "on")
    return Served(protocol, model, flag or _FLAGS[0], "off" if flag else "unknown")


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


def request_of(served: Served, inputs: Sequence[Input]) -> dict[str, Any]:
    """The body of a request. inputs: of one kind; a conversation comes alone."""
    if served.protocol.value is None:
        return {"query": list(inputs)}
    body: dict[str, Any] = {"model": served.model} if served.model is not None else {}
    first = inputs[0]
    if isinstance(first, list) and first and isinstance(first[0], Mapping):
        body |= {"messages": first, "add_generation_prompt": False}
    else:
        body["input"] = list(inputs)
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
