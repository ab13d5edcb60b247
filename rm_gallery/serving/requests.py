"""Bodies of requests: their fields, and the texts that they ask the rewards of.

Fields of other servers that would change a reward are refused, not ignored; any other unknown field is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from rm_gallery.serving.limits import Refused, bad_request
from rm_gallery.serving.served import Conversation, Item, RenderedText, Truncation

_TEXT = {"type": "string"}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_MESSAGE = {
    "type": "object",
    "properties": {"role": _TEXT, "content": {"anyOf": [_TEXT, {"type": "array"}, {"type": "null"}]}},
    "required": ["role"],
}
_MESSAGES = {"type": "array", "items": _MESSAGE, "minItems": 1}

# Checked by hand, for messages that name the place of a mistake instead of listing every form it could have had.
Inputs = Annotated[
    Any, WithJsonSchema({"anyOf": [_TEXT, _IDS, {"type": "array", "items": _TEXT}, {"type": "array", "items": _IDS}]})
]
Messages = Annotated[Any, WithJsonSchema({"anyOf": [_MESSAGES, {"type": "array", "items": _MESSAGES}]})]
Query = Annotated[Any, WithJsonSchema({"anyOf": [_TEXT, _MESSAGES]})]
Queries = Annotated[Any, WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT}, _MESSAGES]})]
Responses = Annotated[Any, WithJsonSchema({"type": "array", "items": {"anyOf": [_TEXT, _MESSAGES]}})]
Tools = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "object"}}, {"type": "null"}]})]
Documents = Annotated[
    Any,
    WithJsonSchema({"type": "array", "items": {"anyOf": [_TEXT, {"type": "object", "properties": {"text": _TEXT}}]}}),
]


class Body(BaseModel):
    """What every request may have."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: str | None = Field(None, description="Name of the model; not needed if the server has one.")
    user: str | None = Field(None, max_length=200, description="Users take turns in the queue.")


class Activated(Body):
    """Bodies of answers that may go through a sigmoid."""

    use_activation: bool | None = Field(None, description="true: sigmoid of the reward instead of the raw reward.")
    activation: bool | None = Field(None, description="The same, by its name in vLLM before 0.11.2.")
    softmax: bool | None = Field(None, description="The same, by its older name.")

    def is_activated(self, default: bool = False) -> bool:
        """Whether the answer has sigmoids; the newest name counts."""
        given = [each for each in (self.use_activation, self.activation, self.softmax) if each is not None]
        return given[0] if given else default


class TextBody(Body):
    """`input` (texts or token ids), or `messages`, with `responses` for several responses to these messages."""

    input: Inputs = None
    messages: Messages = None
    responses: Responses | None = Field(None, description="Responses to `messages`, which are then the prompt.")
    tools: Tools = Field(None, description="Tool definitions for the chat template.")
    add_special_tokens: bool | None = Field(None, description="Of texts; false if they have all special tokens.")
    truncate_prompt_tokens: int | None = Field(None, ge=-1, description="Tokens to keep; -1 for the maximum length.")
    truncation_side: Literal["left", "right"] = "left"
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template: Any = None
    chat_template_kwargs: Any = None

    def truncation(self) -> Truncation:
        """Raises Refused for 0 tokens."""
        if self.truncate_prompt_tokens == 0:
            raise bad_request("must be -1 or above 0", "truncate_prompt_tokens")
        return Truncation(self.truncate_prompt_tokens, self.truncation_side == "left")

    def items(self) -> tuple[list[Item], int]:
        """What to score, and the number of rewards. Raises Refused, naming the place, for any other form."""
        if (self.input is None) == (self.messages is None):
            raise bad_request("a request has either input or messages")
        if self.input is not None:
            for name in ("responses", "tools"):
                if getattr(self, name) is not None:
                    raise bad_request("it belongs to messages, and the request has input", name)
            found = read_inputs(self.input, self.add_special_tokens is not False)
            return found, len(found)
        self._check_template()
        if self.responses is not None:
            if not isinstance(self.responses, list):
                raise bad_request(f"must be a list, not {_kind(self.responses)}", "responses")
            check_messages(self.messages, "messages")
            for number, response in enumerate(self.responses):
                if not isinstance(response, str):
                    check_messages([response] if isinstance(response, Mapping) else response, f"responses[{number}]")
            return [Conversation(self.messages, self.responses, self.tools)], len(self.responses)
        conversations = read_conversations(self.messages)
        return [Conversation(each, None, self.tools) for each in conversations], len(conversations)

    def _check_template(self) -> None:
        """The chat template writes the text that the model was trained on; another text has another reward."""
        if self.add_special_tokens:
            raise bad_request(
                "the chat template writes the special tokens of messages; remove it", "add_special_tokens"
            )
        for name in ("add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs"):
            if getattr(self, name):
                raise bad_request("messages are rendered as in training, without options; remove it", name)


class ClassifyBody(TextBody, Activated):
    """POST /classify."""


class TraceBody(TextBody):
    """POST /trace."""

    def items(self) -> tuple[list[Item], int]:
        if self.truncate_prompt_tokens is not None:
            raise bad_request("a trace has whole texts; remove it", "truncate_prompt_tokens")
        return super().items()


class PoolingBody(ClassifyBody):
    """POST /pooling."""

    task: str | None = Field(None, description="classify, or absent.")

    def items(self) -> tuple[list[Item], int]:
        if self.task not in (None, "classify", "score", "reward"):
            raise bad_request("the model gives one reward for a text: task classify", "task")
        return super().items()


class EmbeddingsBody(TextBody):
    """POST /v1/embeddings: the embedding is the reward, one number."""

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    def items(self) -> tuple[list[Item], int]:
        if self.dimensions not in (None, 1):
            raise bad_request("the embedding is the reward, which has dimension 1", "dimensions")
        return super().items()


class GetRewardBody(Body):
    """POST /get_reward: texts with their special tokens."""

    query: Annotated[Any, WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]})]
    prompts: Any = None
    labels: Any = None

    def items(self) -> list[Item]:
        texts = [self.query] if isinstance(self.query, str) else self.query
        return [RenderedText(text, False) for text in _strings(texts, "query")]


class ScoreBody(Activated):
    """POST /score: prompts and their responses, one to many or in pairs."""

    queries: Queries = None
    documents: Documents = None
    text_1: Queries = None
    text_2: Documents = None
    data_1: Queries = None
    data_2: Documents = None
    items_: Documents = Field(None, alias="items")
    tools: Tools = None

    def read(self) -> tuple[list[Item], int]:
        """One prompt with K documents, or as many prompts as documents."""
        queries = _one_of(self, ("queries", "text_1", "data_1"))
        documents = _one_of(self, ("documents", "text_2", "data_2", "items_"))
        answers = read_documents(documents if isinstance(documents, list) else [documents], "documents")
        if isinstance(queries, str) or _is_message_list(queries):
            _query(queries, "queries")
            return [Conversation(queries, answers, self.tools)], len(answers)
        if not isinstance(queries, list):
            raise bad_request(f"must be a text, a list of texts, or messages, not {_kind(queries)}", "queries")
        prompts = [
            query if _is_message_list(query) else _text(query, f"queries[{n}]") for n, query in enumerate(queries)
        ]
        if len(prompts) == 1:
            return [Conversation(prompts[0], answers, self.tools)], len(answers)
        if len(prompts) != len(answers):
            raise bad_request(f"{len(prompts)} queries for {len(answers)} documents; give one query, or one for each")
        pairs = zip(prompts, answers, strict=True)
        return [Conversation(prompt, [answer], self.tools) for prompt, answer in pairs], len(answers)


class RerankBody(Activated):
    """POST /rerank: responses to a prompt, best first."""

    query: Query
    documents: Documents
    top_n: int | None = Field(None, ge=0, description="Number of results; 0 or absent for all.")
    return_documents: bool = True
    tools: Tools = None

    def read(self) -> tuple[list[Item], list[Any]]:
        """What to score, and the texts of the documents."""
        documents = read_documents(self.documents, "documents")
        return [Conversation(_query(self.query, "query"), documents, self.tools)], documents


class ChatBody(Body):
    """POST /v1/chat/completions: the answer is the reward of the conversation."""

    messages: Annotated[Any, WithJsonSchema(_MESSAGES)]
    tools: Tools = None
    stream: bool | None = False
    n: int | None = 1

    def items(self) -> list[Item]:
        for name, value in (("stream", False), ("n", 1)):
            if getattr(self, name) not in (None, value):
                raise bad_request(f"the answer is one number: {name} must be {str(value).lower()}", name)
        check_messages(self.messages, "messages")
        return [Conversation(self.messages, None, self.tools)]


def read_inputs(value: Any, adds_special_tokens: bool) -> list[Item]:
    """A text, token ids, or a list of texts or of token ids. Raises Refused for anything else."""
    if isinstance(value, str):
        return [RenderedText(value, adds_special_tokens)]
    if not isinstance(value, list):
        raise bad_request(f"must be a text, token ids, or a list of these, not {_kind(value)}", "input")
    if value and isinstance(value[0], list):
        return [_ids(each, f"input[{number}]") for number, each in enumerate(value)]
    if value and isinstance(value[0], int) and not isinstance(value[0], bool):
        return [_ids(value, "input")]
    return [RenderedText(text, adds_special_tokens) for text in _strings(value, "input")]


def read_conversations(value: Any) -> list[Any]:
    """One conversation or a list of them."""
    if isinstance(value, list) and value and all(isinstance(each, list) for each in value):
        for number, each in enumerate(value):
            check_messages(each, f"messages[{number}]")
        return value
    check_messages(value, "messages")
    return [value]


def check_messages(value: Any, name: str) -> None:
    """Raises Refused, naming the place, for anything but messages whose content is text, text parts or null."""
    if not _is_message_list(value):
        raise bad_request("must be a list of messages with role and content", name)
    for number, message in enumerate(value):
        content = message.get("content")
        if isinstance(content, list):
            is_text = all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content)
        else:
            is_text = content is None or isinstance(content, str)
        if not is_text:
            raise bad_request("must be a text, or a list of parts with text", f"{name}[{number}].content")


def read_documents(value: Any, name: str) -> list[Any]:
    """Texts, objects with `text`, or messages."""
    if not isinstance(value, list):
        raise bad_request(f"must be a list, not {_kind(value)}", name)
    found: list[Any] = []
    for number, each in enumerate(value):
        found.append(_query(each.get("text") if isinstance(each, Mapping) else each, f"{name}[{number}]"))
    return found


def check_count(count: int, limit: int) -> None:
    """Raises Refused for more texts than a request may have."""
    if count > limit:
        raise Refused(
            400, f"the request has {count} texts, more than the {limit} of --max-texts; send several requests"
        )


def _one_of(body: BaseModel, names: Sequence[str]) -> Any:
    given = [name for name in names if getattr(body, name) is not None]
    if len(given) != 1:
        raise bad_request(f"a request has one of {', '.join(names).replace('items_', 'items')}")
    return getattr(body, given[0])


def _is_message_list(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(each, Mapping) and "role" in each for each in value)
    )


def _query(value: Any, name: str) -> Any:
    """A text or messages."""
    if isinstance(value, list):
        check_messages(value, name)
        return value
    return _text(value, name)


def _strings(value: Any, name: str) -> list[str]:
    if not isinstance(value, list):
        raise bad_request(f"must be a text or a list of texts, not {_kind(value)}", name)
    return [_text(each, f"{name}[{number}]") for number, each in enumerate(value)]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise bad_request(f"must be a text, not {_kind(value)}", name)
    return value


def _ids(value: Any, name: str) -> list[int]:
    if not isinstance(value, list):
        raise bad_request(f"must be token ids, not {_kind(value)}", name)
    wrong = next((n for n, each in enumerate(value) if isinstance(each, bool) or not isinstance(each, int)), None)
    if wrong is not None:
        raise bad_request(f"must be a token id, not {_kind(value[wrong])}", f"{name}[{wrong}]")
    return value


def _kind(value: Any) -> str:
    """A JSON type in words."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a text"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
