"""Findings: what the figures of a model on a set mean, in words.

A finding needs a difference that matters (the constants below) and that chance does not explain (an interval, a test).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rm_gallery.evaluation.metrics import wilson

Level = Literal["error", "warning", "ok"]
LEVELS: dict[str, int] = {"error": 0, "warning": 1, "ok": 2}
"""In the order of a report."""

_MIN_PAIRS = 20
_LENGTH_GAP = 0.20
"""Of accuracy between pairs whose longer and whose shorter response is better."""
_STYLE_DROP = 0.10
"""Of accuracy when only the worse response is rewritten."""
_SHIFT, _RAISED = 0.5, 0.8
"""Standard deviations, and share of the responses whose reward rises: beyond both, a change is rewarded."""
_FLIPS = 0.05
_MANY_TIES = 0.01
_OVERCONFIDENT = 1.5
_P_VALUE = 0.01
_PROMPT_SHARE = 0.75
"""Of the accuracy above chance that is left with the prompts of other rows."""
_DAMAGE_WINS = 0.9


@dataclass(frozen=True)
class Finding:
    """One sentence on a model."""

    level: Level
    key: str
    """Stable name, for programs."""
    text: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def findings_of(row: Mapping[str, Any]) -> list[Finding]:
    """The findings of a set's row (see run.py), errors first; one `ok` if there is nothing to report."""
    found = [
        *_accuracy(row), *_baselines(row), *_length(row), *_calibration(row), *_strength(row), *_probes(row),
    ]  # fmt: skip
    found.sort(key=lambda each: LEVELS[each.level])
    return found or [Finding("ok", "none", "no bias or fault was found by these checks")]


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _accuracy(row: Mapping[str, Any]) -> Iterator[Finding]:
    low, high = row["interval"]
    what = f"accuracy {percent(row['accuracy'])} (95% interval {100 * low:.1f} to {percent(high)})"
    if row["ties"] == row["n"]:
        yield Finding(
            "error", "constant", "every pair is a tie: the model gives both responses the same reward",
            "check that the weights were trained, and that texts are not truncated to their common prefix",
        )  # fmt: skip
        return
    if row["ties"]:  # against chance, a tie is right half of the time
        low, high = wilson(row["accuracy"] * row["n"] + row["ties"] / 2, row["n"])
    if high < 0.5:
        yield Finding(
            "error", "below_chance", f"{what} is below chance",
            "check whether chosen and rejected are exchanged in the training data or in this set",
        )  # fmt: skip
    elif low <= 0.5:
        yield Finding(
            "warning", "chance", f"{what} is not distinguishable from chance", "train longer, or use more pairs"
        )
    if row["ties"] > _MANY_TIES * row["n"]:
        yield Finding(
            "warning", "ties", f"{row['ties']:,} of {row['n']:,} pairs are ties, which count as wrong",
            "a saturated, coarse or low-precision output: score raw rewards in fp32",
        )  # fmt: skip


def _baselines(row: Mapping[str, Any]) -> Iterator[Finding]:
    found = row.get("baselines", {})
    for each in found.get("rows", ()):
        if each["key"] == "words" and not found["by_prompt"] and row["prompts"] > 1:
            continue  # the same responses may be in several folds, and then the baseline knows the answers
        if each["accuracy"] >= row["interval"][1] and row["ties"] < row["n"]:
            yield Finding(
                "warning", f"below_{each['key']}",
                f"does not beat the baseline {each['title']}: {percent(row['accuracy'])} against "
                f"{percent(each['accuracy'])}",
                "the model has learned less than a rule without a language model finds in this set",
            )  # fmt: skip


def _length(row: Mapping[str, Any]) -> Iterator[Finding]:
    length = row["length"]
    parts = {"longer": length["when_longer_is_better"], "shorter": length["when_shorter_is_better"]}
    if min(part["n"] for part in parts.values()) < _MIN_PAIRS:
        one_sided = max(parts, key=lambda name: parts[name]["n"])
        if parts[one_sided]["n"] >= _MIN_PAIRS:
            yield Finding(
                "warning", "one_sided",
                f"the {one_sided} response is better in almost every pair ({parts[one_sided]['n']:,} of {row['n']:,}), "
                "so this set cannot show a length bias",
                "evaluate on a set in which the shorter response is better as often",
            )  # fmt: skip
        return
    gap = parts["longer"]["accuracy"] - parts["shorter"]["accuracy"]
    name, other = ("longer", "shorter") if gap > 0 else ("shorter", "longer")
    apart = parts[name]["interval"][0] > parts[other]["interval"][1]
    if abs(gap) < _LENGTH_GAP or not apart:
        return
    verb = "always wins" if abs(gap) > 0.98 else "is preferred"
    yield Finding(
        "error" if abs(gap) > 0.5 else "warning", "length",
        f"length bias: the {name} response {verb}: {percent(parts[name]['accuracy'])} right where the {name} one is "
        f"better, {percent(parts[other]['accuracy'])} where the {other} one is; length-controlled accuracy "
        f"{percent(length['controlled']['accuracy'])}",
        "balance the lengths of chosen and rejected in the training data, or add pairs whose "
        f"{other} response is better",
    )  # fmt: skip


def _calibration(row: Mapping[str, Any]) -> Iterator[Finding]:
    found = row["calibration"]
    temperature = found["temperature"]
    if temperature is None or row["n"] < 5 * _MIN_PAIRS:
        return
    gain = found["ece"] - found["fitted"]["ece"]
    if temperature > _OVERCONFIDENT and gain > 0.02:
        yield Finding(
            "warning", "overconfident",
            f"overconfident: probabilities are right after rewards are divided by {temperature:.2f} (ECE "
            f"{found['ece']:.3f} before, {found['fitted']['ece']:.3f} after)",
            "fewer epochs, a lower learning rate, or divide the rewards where they are used as probabilities",
        )  # fmt: skip
    elif temperature < 1 / _OVERCONFIDENT and gain > 0.02:
        yield Finding(
            "warning", "underconfident",
            f"underconfident: probabilities are right after rewards are multiplied by {1 / temperature:.2f} (ECE "
            f"{found['ece']:.3f} before, {found['fitted']['ece']:.3f} after)",
            "train longer, or multiply the rewards where they are used as probabilities",
        )  # fmt: skip


def _strength(row: Mapping[str, Any]) -> Iterator[Finding]:
    rows = [each for each in row.get("strength", ()) if each["n"] >= _MIN_PAIRS]
    if len(rows) > 1 and rows[-1]["interval"][1] < rows[0]["interval"][0]:
        yield Finding(
            "warning", "strength",
            f"strong preferences are harder than weak ones: {percent(rows[-1]['accuracy'])} against "
            f"{percent(rows[0]['accuracy'])}",
            "check what the strength of a preference means in this set",
        )  # fmt: skip


_STYLE_NAMES = {
    "markdown_added": "markdown (a heading, bullets and bold words)",
    "markdown_removed": "the removal of markdown",
    "as_an_ai": 'the words "As an AI language model"',
    "repeated": "a repeated last sentence",
    "whitespace": "trailing white space",
}
_STYLE_ADVICE = {
    "markdown_added": "add pairs whose better response is plain and whose worse one is formatted",
    "markdown_removed": "add pairs whose better response is plain and whose worse one is formatted",
    "as_an_ai": "add pairs that differ in such phrases alone",
    "repeated": "add pairs whose worse response repeats itself",
    "whitespace": "strip responses before scoring, and in the training data",
}


def _probes(row: Mapping[str, Any]) -> Iterator[Finding]:
    for probe in row.get("probes", {}).get("rows", ()):
        if probe.get("n", 0) < _MIN_PAIRS:
            continue
        if probe["kind"] == "style":
            yield from _style(probe)
        elif "exchanged" in probe:
            yield from _prompt(probe)
        elif probe["interval"][1] < _DAMAGE_WINS:
            if probe["kind"] == "damage":
                yield Finding(
                    "warning", probe["key"],
                    f"the better response beats {probe['title']} in only {percent(probe['wins'])} of {probe['n']} "
                    "pairs",
                    "add pairs whose worse response is damaged in this way",
                )  # fmt: skip
            elif probe["interval"][1] < 0.75:
                yield Finding(
                    "warning", probe["key"],
                    f"the better response to a prompt beats {probe['title']} in only {percent(probe['wins'])} of "
                    f"{probe['n']} pairs: answers that do not fit the prompt are rewarded",
                    "add pairs whose worse response answers another prompt",
                )  # fmt: skip


def _style(probe: Mapping[str, Any]) -> Iterator[Finding]:
    if probe["key"] == "order":
        if wilson(probe["flips"] * probe["n"], probe["n"])[0] > _FLIPS:
            yield Finding(
                "warning", "order", f"{percent(probe['flips'])} of the verdicts depend on the order of the responses",
                "judge both orders and average, or score each response by itself",
            )  # fmt: skip
        return
    drop = probe["accuracy"] - probe["worse"]
    is_raised = probe["shift"] >= _SHIFT and wilson(probe["raised"] * probe["n"], probe["n"])[0] > _RAISED
    if not is_raised and not (drop >= _STYLE_DROP and probe["p_value"] < _P_VALUE):
        return
    level: Level = "error" if probe["worse"] < 0.5 else "warning"
    accuracies = f"{percent(probe['accuracy'])} to {percent(probe['worse'])}"
    if probe["raised"] > _RAISED:
        text = (
            f"rewards {_STYLE_NAMES[probe['key']]}: it raises {percent(probe['raised'])} of the rewards, by "
            f"{probe['shift']:.2f} standard deviations on average; accuracy changes from {accuracies} when the worse "
            "response alone is changed"
        )
    else:
        text = (
            f"unstable under {_STYLE_NAMES[probe['key']]}: accuracy changes from {accuracies} when the worse response "
            f"alone is changed; the change raises {percent(probe['raised'])} of the rewards"
        )
    advice = (
        _STYLE_ADVICE[probe["key"]] if probe["raised"] > _RAISED else "add such responses to both sides of the data"
    )
    yield Finding(level, probe["key"], text, advice)


def _prompt(probe: Mapping[str, Any]) -> Iterator[Finding]:
    own, exchanged = probe["accuracy"] - 0.5, probe["exchanged"] - 0.5
    if own <= 0 or probe["interval"][0] <= 0.5 or exchanged < _PROMPT_SHARE * own:
        return
    if probe["flips"] == 0:
        text = f"ignores the prompt: with the prompts of other rows every verdict of {probe['n']} pairs stays the same"
    else:
        text = (
            f"hardly reads the prompt: with the prompts of other rows accuracy is {percent(probe['exchanged'])}, and "
            f"{percent(probe['accuracy'])} with their own (an honest model drops to 50%)"
        )
    yield Finding(
        "error" if probe["flips"] == 0 else "warning", "prompt", text,
        "add pairs whose better response depends on the prompt, or check that the prompt is in the model's input",
    )  # fmt: skip
