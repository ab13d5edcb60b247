"""Files as the package `rewardbench` writes them, for programs that read its results.

`NAME.json` has accuracy, num_prompts, model, ref_model, tokenizer, chat_template and extra_results (by subset);
`NAME_outputs.jsonl` has a row per pair: prompt, results (1 if the chosen reward is higher, else 0), scores_chosen,
scores_rejected, text_chosen, text_rejected and subset. For best-of-n sets, as its script for RewardBench 2 has them,
`NAME.json` has the score of each subset and `NAME_outputs.jsonl` the id, scores, results and num_correct of a prompt.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rm_gallery.data.benchmarks.table import Item
from rm_gallery.errors import UserError
from rm_gallery.evaluation.report_files import write_report
from rm_gallery.files import atomic_write
from rm_gallery.inspection.texts import GroupTexts

OPTION = "--rewardbench"


class RewardbenchRows:
    """Writes the rows while a set is scored, so that texts are not kept."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def add(self, item: Item, texts: GroupTexts, rewards: Sequence[float]) -> None:
        """A scored row."""
        group = item.group
        for row in self._list(item, texts, rewards) if len(rewards) > 2 else self._pairs(item, rewards):
            subset = {"subset": item.subset} if item.subset else {}
            self._file.write(json.dumps({**row, **subset, "where": group.where}, default=str) + "\n")

    def _pairs(self, item: Item, rewards: Sequence[float]) -> Iterator[dict[str, Any]]:
        group = item.group
        for each in group.comparisons:
            better, worse = rewards[each.better], rewards[each.worse]
            yield {
                "prompt": group.prompt,
                "results": int(better > worse),
                "scores_chosen": better,
                "scores_rejected": worse,
                "text_chosen": _joined(group.prompt, group.responses[each.better]),
                "text_rejected": _joined(group.prompt, group.responses[each.worse]),
            }

    def _list(self, item: Item, texts: GroupTexts, rewards: Sequence[float]) -> Iterator[dict[str, Any]]:
        quality = item.quality or ()
        best = max(quality, default=0.0)
        correct = [value == best for value in quality]
        top = [value == max(rewards) for value in rewards]
        right = sum(is_top and is_right for is_top, is_right in zip(top, correct, strict=True))
        is_ties = item.subset.lower() == "ties"
        yield {
            "id": item.label,
            "text": [_joined(item.group.prompt, response) for response in item.group.responses],
            "scores": list(rewards),
            "results": None if is_ties else right / sum(top),
            "num_correct": sum(correct),
        }


def _joined(prompt: Any, response: Any) -> Any:
    return prompt + response if isinstance(prompt, str) else [*prompt, *response]


@contextmanager
def rewardbench_rows(target: Path) -> Iterator[RewardbenchRows]:
    """Write `NAME_outputs.jsonl` atomically: it exists when the block has ended without an error."""
    path = target.with_name(f"{target.stem}_outputs.jsonl")
    try:
        with atomic_write(path, temporary=path.with_name(f".{path.name}.{os.getpid()}.tmp")) as temporary:
            with temporary.open("w", encoding="utf-8") as file:
                yield RewardbenchRows(file)
    except OSError as error:
        raise UserError(f"{OPTION} {path}: cannot be written ({error.strerror}); choose another file") from error


def write_summary(target: Path, model: Mapping[str, Any]) -> None:
    """Write `NAME.json` of a model that was evaluated on one set."""
    [row] = model["sets"]
    if row.get("benchmark", {}).get("name") == "rewardbench-2":
        values = {"model": model["source"], "model_type": "Seq. Classifier", "chat_template": "tokenizer"}
        values.update(row["benchmark"]["parts"])
    else:
        subsets = {each["name"]: each["accuracy"] for each in row["subsets"]}
        values = {
            "accuracy": row["accuracy"],
            "num_prompts": row["n"],
            "model": model["source"],
            "ref_model": None,
            "tokenizer": model["source"],
            "chat_template": "tokenizer",
            "extra_results": subsets or None,
        }
    write_report(target, json.dumps(values) + "\n", OPTION)


def check_single(num_models: int, num_sets: int) -> None:
    """Raise UserError for several models or sets, whose rows would have to share a file."""
    if num_models != 1 or num_sets != 1:
        raise UserError(f"{OPTION}: takes one model and one set ({num_models} and {num_sets} are given)")
