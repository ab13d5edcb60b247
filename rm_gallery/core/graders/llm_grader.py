"""LLMGrader: a chat model as judge, with its prompts; a reward model in its place scores directly."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, ClassVar

from rm_gallery.core.graders.base_grader import BaseGrader, GraderError, GraderMode, GraderRank, GraderScore
from rm_gallery.core.graders.reward import as_rank, as_score, find_scorer, is_reward_model, places, score_responses
from rm_gallery.core.models.base_chat_model import BaseChatModel, ChatMessage, ChatResponse
from rm_gallery.core.models.openai_chat_model import OpenAIChatModel
from rm_gallery.errors import UserError
from rm_gallery.schema import Message

log = logging.getLogger(__name__)

LANGUAGES = ("en", "zh")
_FIELD = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")
_TAG = re.compile(r"<(?=/?(?:query|context|reference_response|response(?:_\d+)?)>)")


class LLMGrader(BaseGrader):
    """Grades with a chat model by a given criterion or prompt.

    A response gets a score from `min_score` to `max_score` and a reason, several responses get a rank. With a reward
    model the score is the reward and the prompt is not used; the rank of several responses has `rewards` and
    `win_probabilities` in its metadata.
    """

    prompt_name: ClassVar[str] = ""
    """Criterion of a subclass: a file in prompts/."""
    needed: ClassVar[tuple[str, ...]] = ("query", "response")
    """Required arguments of `aevaluate` with a chat model."""

    def __init__(
        self,
        model: BaseChatModel | Mapping[str, Any] | Any,
        name: str = "",
        mode: GraderMode | str = GraderMode.POINTWISE,
        description: str = "",
        *,
        criterion: str = "",
        template: str | Sequence[ChatMessage | Message] | Mapping[str, Any] | None = None,
        language: str = "en",
        min_score: float = 1,
        max_score: float = 5,
        **options: Any,
    ) -> None:
        """model: a chat model, a dict of OpenAIChatModel's arguments, a reward model, or any object with `ascore`.

        mode: for several responses, `listwise` compares them in one request, `pointwise` scores each in its own.
        criterion: what to judge and what the levels of the scale mean; becomes part of the built-in prompt.
        template: replaces the built-in prompt, as text, messages, or a dict of either by language; `{field}` is
        replaced by an argument of `aevaluate`, `{{` by a brace. It must ask for JSON with `score` (or `rank`) and
        `reason`.
        language: of the built-in prompts, `en` or `zh`.
        options: sent with each request (temperature, max_tokens, ...).
        Raises UserError for an invalid model, both or neither of criterion and template, an empty scale, and an unknown
        language.
        """
        super().__init__(name or self.prompt_name, mode, description)
        if isinstance(model, Mapping):
            model = OpenAIChatModel(**model)
        if not is_reward_model(model) and not callable(getattr(model, "achat", None)):
            raise UserError(f"grader {self.name!r}: model is {type(model).__name__}; give a chat or reward model")
        if language not in LANGUAGES:
            raise UserError(f"grader {self.name!r}: language={language}: must be {' or '.join(LANGUAGES)}")
        if not min_score < max_score:
            raise UserError(f"grader {self.name!r}: the scale {min_score}..{max_score} is empty")
        own = bool(criterion) + (template is not None)
        if own > 1 or not (own or self.prompt_name or is_reward_model(model)):
            raise UserError(f"grader {self.name!r}: give either criterion or template")
        self.model, self.language, self.options = model, language, options
        self.criterion, self.template = criterion, template
        self.min_score, self.max_score = min_score, max_score
        self._scorer: Any = None

    async def aevaluate(
        self,
        query: Any = None,
        response: Any = None,
        context: Any = "",
        reference_response: Any = "",
        tools: Any = None,
        **fields: Any,
    ) -> GraderScore | GraderRank | GraderError:
        """Grade one response (GraderScore), or a list of several (GraderRank).

        query, response: text or chat messages. context: what the query refers to; for a reward model it is prepended
        to the query. reference_response: a correct answer; not used by a reward model. tools: definitions of the tools
        of the conversation (a list, or JSON text), for a reward model and for templates. fields: more fields of a
        template. Never raises: failures are returned as GraderError.
        """
        given = {**fields, "query": query, "response": response}
        given.update(context=context or "", reference_response=reference_response or "", tools=tools)
        try:
            several = _is_several(response)
            if is_reward_model(self.model):
                return await self._reward(given, several)
            self._check_needed(given)
            if not several:
                return await self._judge(given)
            if self.mode == GraderMode.LISTWISE:
                return await self._compare(given)
            return await self._judge_each(given)
        except UserError as error:
            return GraderError(name=self.name, error=str(error))
        except Exception as error:
            log.debug("grader %s failed", self.name, exc_info=True)
            return GraderError(name=self.name, error=f"{type(error).__name__}: {error}")

    async def _reward(self, given: dict[str, Any], several: bool) -> GraderScore | GraderRank:
        self._check_needed(given, tuple(name for name in self.needed if name in ("query", "response")))
        if self._scorer is None:
            self._scorer = await find_scorer(self.model)
        query, context = given["query"], given["context"]
        if context:
            before = as_text(context)
            if is_messages(query):
                query = [{"role": "system", "content": before}, *query]
            else:
                query = f"{before}\n\n{query}" if query else before
        responses = given["response"] if several else [given["response"]]
        rewards = await score_responses(self._scorer, query, responses, given["tools"])
        metadata = {"not_used": ["reference_response"]} if given["reference_response"] else {}
        return as_rank(self.name, rewards, metadata) if several else as_score(self.name, rewards[0], metadata)

    async def _judge(self, given: dict[str, Any]) -> GraderScore:
        response = await self._ask("pointwise", given, _SCORE_FORMAT, {})
        score = response.parsed["score"]
        if not self.min_score <= score <= self.max_score:
            raise UserError(f"the model returned the score {score}, outside {self.min_score}..{self.max_score}")
        return GraderScore(name=self.name, score=score, reason=_reason(response), metadata=_metadata(response))

    async def _compare(self, given: dict[str, Any]) -> GraderRank:
        count = len(given["response"])
        response = await self._ask("listwise", given, _RANK_FORMAT, {"num_responses": count})
        rank = response.parsed["rank"]
        if sorted(rank) != list(range(1, count + 1)):
            raise UserError(f"the model returned the rank {rank}, which is not a permutation of 1..{count}")
        return GraderRank(name=self.name, rank=rank, reason=_reason(response), metadata=_metadata(response))

    async def _judge_each(self, given: dict[str, Any]) -> GraderRank:
        asked = [self._judge({**given, "response": response}) for response in given["response"]]
        made = await asyncio.gather(*asked, return_exceptions=True)
        for number, result in enumerate(made):
            if isinstance(result, BaseException):
                if not isinstance(result, UserError):
                    raise result
                raise UserError(f"response {number}: {result}") from result
        results = [result for result in made if isinstance(result, GraderScore)]
        scores = [result.score for result in results]
        metadata = {"scores": scores, "reasons": [result.reason for result in results]}
        return GraderRank(name=self.name, rank=places(scores), metadata=metadata)

    async def _ask(
        self, frame: str, given: dict[str, Any], answer_format: dict[str, Any], extra: dict[str, Any]
    ) -> ChatResponse:
        """A response whose JSON matches the format. Raises UserError if it does not."""
        scale = {"min_score": self.min_score, "max_score": self.max_score, **extra}
        messages = self._messages(frame, given, scale)
        response: ChatResponse = await self.model.achat(messages, response_format=answer_format, **self.options)
        if response.parsed is None:
            reason = response.metadata.get("parse_error", "no JSON")
            raise UserError(f"the model's response cannot be parsed ({reason})")
        return response

    def _messages(self, frame: str, given: dict[str, Any], scale: dict[str, Any]) -> list[Message]:
        """The prompt: the given template, or the built-in one with the criterion, then the query and responses."""
        if self.template is not None:
            template: Any = self.template
            if isinstance(template, Mapping) and "role" not in template:
                template = template.get(self.language) or next(iter(template.values()))
            turns = [{"role": "user", "content": template}] if isinstance(template, str) else template
            dicts = [turn.model_dump(exclude_none=True) if isinstance(turn, ChatMessage) else turn for turn in turns]
            return [{**turn, "content": fill(turn["content"], {**scale, **given})} for turn in dicts]
        criterion = self.criterion or load_prompt(self.prompt_name, self.language)
        system = fill(load_prompt(frame, self.language), {**scale, "criterion": criterion})
        parts = {name: given[name] for name in ("query", "context", "reference_response") if given[name]}
        if frame == "listwise":
            parts.update({f"response_{number}": text for number, text in enumerate(given["response"], start=1)})
        else:
            parts["response"] = given["response"]
        return [{"role": "system", "content": system}, {"role": "user", "content": show_material(parts)}]

    def _check_needed(self, given: dict[str, Any], names: tuple[str, ...] | None = None) -> None:
        # An empty response is graded; an empty query is an error.
        for name in self.needed if names is None else names:
            if given[name] is None or (not given[name] and (name != "response" or given[name] != "")):
                raise UserError(f"{name} is missing; give aevaluate(..., {name}=...)")


_SCORE_FORMAT: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {
        "name": "judgement",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"reason": {"type": "string"}, "score": {"type": "number"}},
            "required": ["reason", "score"],
            "additionalProperties": False,
        },
    },
}
_RANK_FORMAT: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {
        "name": "ranking",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {
                "reason": {"type": "string"},
                "rank": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["reason", "rank"],
            "additionalProperties": False,
        },
    },
}


def _is_several(response: Any) -> bool:
    return isinstance(response, Sequence) and not isinstance(response, str) and not is_messages(response)


def _reason(response: ChatResponse) -> str:
    return str(response.parsed.get("reason", ""))


def _metadata(response: ChatResponse) -> dict[str, Any]:
    usage = response.usage.model_dump() if response.usage else None
    return {"model": response.metadata.get("model", ""), "raw": response.content, "usage": usage}


@functools.cache
def load_prompt(name: str, language: str) -> str:
    """The text of prompts/NAME.LANGUAGE.md. Raises UserError for an unknown language."""
    if language not in LANGUAGES:
        raise UserError(f"language={language}: must be {' or '.join(LANGUAGES)}")
    files = resources.files("rm_gallery.core.graders") / "prompts"
    return files.joinpath(f"{name}.{language}.md").read_text(encoding="utf-8").strip()


def fill(template: str, fields: Mapping[str, Any]) -> str:
    """Replace each `{name}` of the template by the text of that field, in one pass; `{{` and `}}` are braces.

    Braces in field values, and around anything but a name (JSON), are kept. Raises UserError for a missing field.
    """

    def put(match: re.Match[str]) -> str:
        name = match.group(1)
        if name is None:
            return match.group()[0]
        if fields.get(name) is None:
            raise UserError(f"the template needs the field {{{name}}} (given: {', '.join(_given(fields))})")
        return as_text(fields[name])

    return _FIELD.sub(put, template)


def _given(fields: Mapping[str, Any]) -> list[str]:
    return [name for name, value in fields.items() if value is not None] or ["nothing"]


def as_text(value: Any) -> str:
    """A value as prompt text: text unchanged, messages with their roles, anything else as JSON."""
    if isinstance(value, str):
        return value
    if is_messages(value):
        if len(value) == 1:
            return as_text(value[0].get("content") or "")
        return "\n\n".join(f"{turn['role']}: {as_text(turn.get('content') or '')}" for turn in value)
    return json.dumps(value, ensure_ascii=False, default=str)


def is_messages(value: Any) -> bool:
    """Whether the value is a list of messages."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        return False
    return all(isinstance(turn, Mapping) and "role" in turn for turn in value)


def show_material(parts: Mapping[str, Any]) -> str:
    """Each part between tags of its name. Such tags inside a part are escaped, so that it cannot close its own tag."""
    texts = {name: _TAG.sub("< ", as_text(value)) for name, value in parts.items()}
    return "\n\n".join(f"<{name}>\n{text}\n</{name}>" for name, text in texts.items())
