"""Robustness probes: small changes of responses and prompts that should not, or should, change a model's verdict.

A sample of the comparisons of a set is scored again with changed texts. Each probe is one of three kinds:

- `style`: both responses are rewritten without changing what they say. The verdict should stay. The rewritten worse
  response must not beat the better one as it was, and the rewritten better one must not lose to the worse one.
- `damage`: the better response is compared with something that is certainly worse; it should win.
- `prompt`: both responses are scored with another row's prompt. The verdict should become independent of the label: an
  accuracy that stays as it was means that the model does not read the prompt.
"""

# S sampled comparisons

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rm_gallery.evaluation.metrics import mcnemar, wilson
from rm_gallery.evaluation.scorers import Scorer
from rm_gallery.schema import Message, PreferenceGroup

Response = Any
"""Text, or messages whose last one is changed."""

DEFAULT_PAIRS = 200
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])|\n+")


@dataclass(frozen=True, slots=True)
class ProbePair:
    """A sampled comparison with its rewards."""

    group: PreferenceGroup
    """Its responses are the better one and the worse one; turns that both begin with are part of the prompt."""
    better: float
    worse: float


@dataclass(frozen=True)
class StyleProbe:
    """A change of a response that keeps what it says."""

    key: str
    title: str
    change: Callable[[str], str]


def _add_markdown(text: str) -> str:
    """A heading, and the sentences as a list whose first words are bold."""
    sentences = [each for each in _SENTENCE_END.split(text.strip()) if each.strip()]
    lines = [re.sub(r"^(\S+)", r"**\1**", each, count=1) for each in sentences]
    return "## Answer\n\n" + "\n".join(f"- {line}" for line in lines)


def _remove_markdown(text: str) -> str:
    """Without headings, bullets, emphasis, code fences and backticks."""
    text = re.sub(r"^[ \t]*```.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^[ \t]*(?:#{1,6}[ \t]+|[-*+][ \t]+|>[ \t]?)", "", text, flags=re.MULTILINE)
    text = re.sub(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1", r"\2", text)
    text = re.sub(r"(?<![\w*])\*(?=\S)([^*\n]+?)(?<=\S)\*(?![\w*])", r"\1", text)
    return text.replace("`", "")


def _repeat_sentence(text: str) -> str:
    """With the last sentence twice."""
    sentences = [each for each in _SENTENCE_END.split(text.strip()) if each.strip()]
    return f"{text.rstrip()} {sentences[-1]}" if sentences else text


STYLE_PROBES = (
    StyleProbe("whitespace", "trailing white space", lambda text: text + " \n"),
    StyleProbe("markdown_added", "markdown added", _add_markdown),
    StyleProbe("markdown_removed", "markdown removed", _remove_markdown),
    StyleProbe("repeated", "last sentence repeated", _repeat_sentence),
    StyleProbe("as_an_ai", '"As an AI ..." in front', lambda text: f"As an AI language model, {text}"),
)
_GERMAN = (
    "Vielen Dank f\u00fcr Ihre Frage. Darauf gibt es verschiedene Antworten, und es h\u00e4ngt ganz davon ab, was Sie "
    "genau wissen m\u00f6chten. Ich helfe Ihnen gerne weiter."
)


def run_probes(pairs: Sequence[ProbePair], scorer: Scorer) -> list[dict[str, Any]]:
    """A row per probe; a row without `n` has the reason why the probe does not apply.

    Rows of kind `style`: `shift`, the mean change of a reward in standard deviations of the rewards; `raised`, the
    share of responses whose reward rises; `accuracy`, as it was; `both`, `worse`, `better`: accuracy when both
    responses, the worse one alone or the better one alone are changed; `flips`: share of pairs whose verdict differs
    when both are changed; `p_value` of McNemar's test between `accuracy` and `worse`. Rows of kind `damage`: `wins`,
    the share of pairs in which the better response beats the damaged one. Rows of kind `prompt`: `accuracy`, and
    `exchanged` with the other prompt.
    """
    before = np.array([[pair.better, pair.worse] for pair in pairs])
    spread = float(before.std()) or 1.0
    rows = [_order_row(pairs, before, scorer)]
    rows += [_style_row(probe, pairs, before, spread, scorer) for probe in STYLE_PROBES]
    rows.append(_damage("empty", "an empty response", [_last_replaced(pair, "") for pair in pairs], pairs, scorer))
    truncated = [_last_replaced(pair, _half(_last_text(pair.group.responses[0]))) for pair in pairs]
    rows.append(_damage("truncated", "its first half", truncated, pairs, scorer))
    foreign = [_last_replaced(pair, _GERMAN) for pair in pairs]
    rows.append(_damage("language", "a vague answer in German", foreign, pairs, scorer))
    return rows + _prompt_rows(pairs, before, scorer)


def _score(groups: Sequence[PreferenceGroup], scorer: Scorer) -> np.ndarray:
    """[S, K] rewards, NaN for a group that cannot be scored; in one call, so that it is packed well."""
    width = max(len(group.responses) for group in groups)
    found = [each if not isinstance(each, Exception) else [np.nan] * width for each in scorer.score(groups)]
    return np.array(found, np.float64)


def _rewritten(pair: ProbePair, change: Callable[[str], str]) -> PreferenceGroup:
    return replace(pair.group, responses=[_with_last(each, change) for each in pair.group.responses], comparisons=())


def _last_replaced(pair: ProbePair, text: str) -> PreferenceGroup:
    """The better response, with its last turn replaced."""
    return replace(pair.group, responses=[_with_last(pair.group.responses[0], lambda _: text)], comparisons=())


def _with_last(response: Response, change: Callable[[str], str]) -> Response:
    if isinstance(response, str):
        return change(response)
    *turns, last = response
    return [*turns, {**last, "content": change(_content(last))}]


def _content(message: Message) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _last_text(response: Response) -> str:
    return response if isinstance(response, str) else _content(response[-1])


def _half(text: str) -> str:
    return text[: len(text) // 2]


def _row(key: str, title: str, kind: str, known: np.ndarray) -> dict[str, Any]:
    return {"key": key, "title": title, "kind": kind, "n": int(known.sum())}


def _share(right: np.ndarray) -> dict[str, Any]:
    low, high = wilson(float(right.sum()), len(right))
    return {"accuracy": float(right.mean()), "interval": [low, high]}


def _order_row(pairs: Sequence[ProbePair], before: np.ndarray, scorer: Scorer) -> dict[str, Any]:
    """The two responses in the other order: a model that scores each by itself gives the same rewards."""
    swapped = [replace(pair.group, responses=list(reversed(pair.group.responses)), comparisons=()) for pair in pairs]
    after = _score(swapped, scorer)[:, ::-1]
    known = np.isfinite(after).all(axis=1)
    if not known.any():
        return {"key": "order", "title": "the other order", "kind": "style", "reason": "cannot be scored"}
    flips = _verdict(before[known]) != _verdict(after[known])
    row = _row("order", "the other order", "style", known)
    accuracies = {"accuracy": _share(before[known, 0] > before[known, 1])["accuracy"]}
    return {
        **row,
        **accuracies,
        "both": float((after[known, 0] > after[known, 1]).mean()),
        "flips": float(flips.mean()),
    }


def _verdict(rewards: np.ndarray) -> np.ndarray:
    return np.sign(rewards[:, 0] - rewards[:, 1])


def _style_row(
    probe: StyleProbe, pairs: Sequence[ProbePair], before: np.ndarray, spread: float, scorer: Scorer
) -> dict[str, Any]:
    groups = [_rewritten(pair, probe.change) for pair in pairs]
    changed = [
        any(new != old for new, old in zip(group.responses, pair.group.responses, strict=True))
        for group, pair in zip(groups, pairs, strict=True)
    ]
    if not any(changed):
        reason = "no sampled response has any" if probe.key == "markdown_removed" else "no response changes"
        return {"key": probe.key, "title": probe.title, "kind": "style", "reason": reason}
    kept = [group for group, is_changed in zip(groups, changed, strict=True) if is_changed]
    before, after = before[np.array(changed)], _score(kept, scorer)
    known = np.isfinite(after).all(axis=1)
    if not known.any():
        return {"key": probe.key, "title": probe.title, "kind": "style", "reason": "cannot be scored"}
    before, after = before[known], after[known]
    right, attacked = before[:, 0] > before[:, 1], before[:, 0] > after[:, 1]
    return {
        **_row(probe.key, probe.title, "style", known),
        "shift": float((after - before).mean() / spread),
        "raised": float((after > before).mean()),
        "accuracy": float(right.mean()),
        "both": float((after[:, 0] > after[:, 1]).mean()),
        "worse": float(attacked.mean()),
        "better": float((after[:, 0] > before[:, 1]).mean()),
        "flips": float((_verdict(before) != _verdict(after)).mean()),
        "p_value": mcnemar(int((right & ~attacked).sum()), int((~right & attacked).sum())),
    }


def _damage(
    key: str, title: str, groups: Sequence[PreferenceGroup], pairs: Sequence[ProbePair], scorer: Scorer
) -> dict[str, Any]:
    after = _score(groups, scorer)[:, 0]
    known = np.isfinite(after)
    if not known.any():
        return {"key": key, "title": title, "kind": "damage", "reason": "cannot be scored"}
    better = np.array([pair.better for pair in pairs])[known]
    share = _share(better > after[known])
    return {**_row(key, title, "damage", known), "wins": share["accuracy"], "interval": share["interval"]}


def _prompt_rows(pairs: Sequence[ProbePair], before: np.ndarray, scorer: Scorer) -> list[dict[str, Any]]:
    """The prompt of another row, and the answer to another row's prompt."""
    titles = {"prompt": "the prompt of another row", "other_answer": "the answer to another prompt"}
    partners = _partners([pair.group.prompt for pair in pairs])
    if not partners:
        reason = "the rows have no prompts that differ"
        return [{"key": key, "title": title, "kind": "prompt", "reason": reason} for key, title in titles.items()]
    own = np.array(list(partners))
    exchanged = [replace(pairs[i].group, prompt=pairs[j].group.prompt, comparisons=()) for i, j in partners.items()]
    after = _score(exchanged, scorer)
    known = np.isfinite(after).all(axis=1)
    rows: list[dict[str, Any]] = []
    if known.any():
        before = before[own][known]
        share = _share(after[known, 0] > after[known, 1])
        rows.append(
            {
                **_row("prompt", titles["prompt"], "prompt", known),
                "accuracy": float((before[:, 0] > before[:, 1]).mean()),
                "exchanged": share["accuracy"],
                "interval": share["interval"],
                "flips": float((_verdict(before) != _verdict(after[known])).mean()),
            }
        )
    foreign = [
        replace(pairs[i].group, responses=[pairs[j].group.responses[0]], comparisons=()) for i, j in partners.items()
    ]
    other = _damage("other_answer", titles["other_answer"], foreign, [pairs[i] for i in own], scorer)
    return [*rows, {**other, "kind": "prompt"}]


def _partners(prompts: Sequence[Any]) -> dict[int, int]:
    """Row -> row with another prompt, half of the sample away where possible; rows without one are not in it."""
    asked = [index for index, prompt in enumerate(prompts) if prompt]
    found: dict[int, int] = {}
    for place, index in enumerate(asked):
        others = (asked[(place + len(asked) // 2 + step) % len(asked)] for step in range(len(asked)))
        other = next((each for each in others if prompts[each] != prompts[index]), None)
        if other is not None:
            found[index] = other
    return found


def probe_pair(group: PreferenceGroup, better: int, worse: int, rewards: Sequence[float]) -> ProbePair:
    """The comparison of two responses of a group, as a pair of its own."""
    responses = [group.responses[better], group.responses[worse]]
    prompt = group.prompt
    if group.style == "chat":
        chats = [list(each) for each in responses if not isinstance(each, str)]
        shared = 0
        while all(len(chat) > shared + 1 and chat[shared] == chats[0][shared] for chat in chats):
            shared += 1
        prompt = [*prompt, *chats[0][:shared]]
        responses = [chat[shared:] for chat in chats]
    return ProbePair(
        replace(group, prompt=prompt, responses=responses, comparisons=()), rewards[better], rewards[worse]
    )
