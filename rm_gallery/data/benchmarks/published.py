"""Published benchmarks by name: where they are, how their rows are read, and how they are scored.

To add one: write a reader from a row to an `Item`, a score in benchmark_scores.py, and an entry in `BENCHMARKS`.
Unlike in other sets, a row that cannot be read is an error: a score over the other rows would not be comparable.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rm_gallery.data.benchmarks import scores
from rm_gallery.data.benchmarks.scores import Score
from rm_gallery.data.benchmarks.table import Item, Table
from rm_gallery.data.formats import as_messages, hash_prompt, prompt_key, read_cell
from rm_gallery.data.sources import DataFile, FileEntry, Row, resolve_entries
from rm_gallery.data.sources.config import EVAL_SETS
from rm_gallery.data.sources.local import local_path
from rm_gallery.errors import BadRow, UserError
from rm_gallery.schema import Comparison, PreferenceGroup

KEY = "SET"
"""Name of the sets in messages, as in the usage line."""


class SkippedRow(BadRow):
    """A row that the benchmark itself does not score, such as a tie of the annotators; it is counted as dropped."""


_DATA = ("**/*.parquet", "**/*.jsonl", "**/*.json")


@dataclass(frozen=True)
class Benchmark:
    """One entry of `BENCHMARKS`."""

    name: str
    title: str
    read: Callable[[Row], Item]
    score: Callable[[Table, np.ndarray], Score]
    hub: tuple[FileEntry, ...] = ()
    """Where it is on the hub; empty if it is not there."""
    files: tuple[tuple[str, ...], ...] = ()
    """Patterns of its files in a local folder: those of the first entry that matches anything."""
    home: str = ""
    """Where to get it, if it is not on the hub."""

    def find(self, path: str | None, *, key: str = KEY) -> list[DataFile]:
        """Its files: of a local copy, else of the hub. key: option or key that names the sets, for messages.

        Raises UserError where there are none.
        """
        copy = f"{self.name}=FOLDER" if key == KEY else f"{EVAL_SETS}.{self.name}=FOLDER"
        if path is not None:
            return resolve_entries([str(each) for each in self.local_files(path, key=key)], key=key)
        if not self.hub:
            raise UserError(f"{key}={self.name}: not on the hub; get {self.home} and name its folder: {copy}")
        try:
            return resolve_entries(list(self.hub), key=key)
        except UserError as error:
            raise UserError(f"{error}; for a local copy of {self.title}, set {copy}") from error

    def item(self, row: Row) -> Item:
        """A row. Raises SkippedRow for one that is not scored, and UserError for one that cannot be read."""
        try:
            if row.fault:
                raise BadRow(row.fault)
            return self.read(row)
        except SkippedRow:
            raise
        except BadRow as error:
            raise UserError(
                f"{row.where}: {error}; a row of {self.title} cannot be dropped, get the published files"
            ) from None

    def local_files(self, path: str, *, key: str = KEY) -> list[Path]:
        """The files of a local copy. Raises UserError where there are none."""
        what = f"{key}={self.name}={path}" if key == KEY else f"{key}={path}"
        folder = local_path(path)
        if folder.is_file():
            return [folder]
        if not folder.is_dir():
            raise UserError(f"{what}: no such folder (working directory {Path.cwd()})")
        for patterns in (*self.files, *((each,) for each in _DATA)):
            found = {each for pattern in patterns for each in folder.glob(pattern) if each.is_file()}
            visible = [each for each in found if not any(p.startswith(".") for p in each.relative_to(folder).parts)]
            if visible:
                return sorted(visible)
        raise UserError(f"{what}: the folder has no parquet, JSON lines or JSON file of {self.title}")


def make_item(
    row: Row,
    prompt: Any,
    responses: Sequence[Any],
    comparisons: Sequence[Comparison],
    *,
    subset: str = "",
    quality: Sequence[float] | None = None,
    label: str = "",
) -> Item:
    """A row as a chat. Raises BadRow for a missing prompt or response, and without a comparison."""
    turns = as_messages(read_cell(prompt, "prompt"), "user")
    answers = []
    for value in responses:
        if not isinstance(value, str):
            raise BadRow("null response" if value is None else "response that is not text")
        answers.append([{"role": "assistant", "content": value}])
    if len(answers) < 2:
        raise BadRow("fewer than 2 responses")
    group = PreferenceGroup(turns, answers, tuple(comparisons), "chat", where=row.where)
    return Item(group, hash_prompt(prompt_key(group)), subset, quality, label)


def _value(row: Row, name: str) -> Any:
    if name not in row.values:
        raise BadRow(f"no column {name!r} (columns: {', '.join(row.values) or 'none'})")
    if row.values[name] is None:
        raise BadRow(f"null {name}")
    return row.values[name]


def _list(row: Row, name: str) -> list[Any]:
    value = _value(row, name)
    if not isinstance(value, list) or not value:
        raise BadRow(f"{name} that is {'empty' if value == [] else 'not a list'}")
    return value


def _best_against_rest(num_correct: int, count: int) -> list[Comparison]:
    """Every correct response, which come first, is better than every wrong one."""
    return [Comparison(better, worse) for better in range(num_correct) for worse in range(num_correct, count)]


def _read_rewardbench(row: Row) -> Item:
    responses = [_value(row, "chosen"), _value(row, "rejected")]
    return make_item(row, _value(row, "prompt"), responses, [Comparison(0, 1)], subset=str(_value(row, "subset")))


def _read_prior(row: Row) -> Item:
    responses = [_value(row, "chosen"), _value(row, "rejected")]
    subset = re.split(r"[-.]", Path(row.file).name)[0]
    return make_item(row, _value(row, "prompt"), responses, [Comparison(0, 1)], subset=subset)


def _read_rewardbench2(row: Row) -> Item:
    chosen, rejected = row.values.get("chosen"), _list(row, "rejected")
    if not isinstance(chosen, list) or not chosen:
        raise BadRow("no correct response: chosen is empty or not a list")
    subset, label = str(_value(row, "subset")), str(row.values.get("id", ""))
    if subset.lower() == "ties" and not re.fullmatch(r"(ref|tied):\d+", label):
        raise BadRow(f"id {label!r} of the subset Ties, which must be ref:NUMBER or tied:NUMBER")
    count = len(chosen) + len(rejected)
    quality = [1.0] * len(chosen) + [0.0] * len(rejected)
    return make_item(
        row, _value(row, "prompt"), [*chosen, *rejected], _best_against_rest(len(chosen), count),
        subset=subset, quality=quality, label=label,
    )  # fmt: skip


def _read_rm_bench(row: Row) -> Item:
    chosen, rejected = _list(row, "chosen"), _list(row, "rejected")
    if len(chosen) != 3 or len(rejected) != 3:
        raise BadRow(f"{len(chosen)} chosen and {len(rejected)} rejected responses, not 3 and 3")
    domain = str(row.values.get("domain") or Path(row.file).name)  # the files of single domains have no such column
    known = next((each for each in ("chat", "math", "code", "safety") if domain.startswith(each)), "")
    if not known:
        raise BadRow(f"domain {domain[:20]!r}, which must be chat, math, code or safety")
    return make_item(row, _value(row, "prompt"), [*chosen, *rejected], _best_against_rest(3, 6), subset=known)


def _read_judgebench(row: Row) -> Item:
    label, source = _value(row, "label"), str(_value(row, "source"))
    if label not in ("A>B", "B>A"):
        raise BadRow(f"label {str(label)[:20]!r}, which must be A>B or B>A")
    responses = [_value(row, "response_A"), _value(row, "response_B")]
    comparison = Comparison(0, 1) if label == "A>B" else Comparison(1, 0)
    sources = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")
    subset = next((each for each in sources if source.startswith(each)), source)
    writer = str(row.values.get("response_model") or "responses")
    return make_item(row, _value(row, "question"), responses, [comparison], subset=subset, label=writer)


def _read_rmb(row: Row) -> Item:
    prompt = [{"role": turn["role"], "content": turn["content"]} for turn in _list(row, "conversation_input")]
    scenario = str(_value(row, "category_path"))
    kind = "/".join(scenario.split("/")[:2])
    if "bon_best" in row.values:
        best, others = _value(row, "bon_best"), _list(row, "loser_list")
        answers = [_answer(best, "bon_best"), *(_answer(each, "loser_list") for each in others)]
    else:
        answers = [_answer(_value(row, name), name) for name in ("chosen", "reject")]
    quality = [1.0] + [0.0] * (len(answers) - 1)
    comparisons = _best_against_rest(1, len(answers))
    return make_item(row, prompt, answers, comparisons, subset=scenario, quality=quality, label=kind)


def _answer(value: Any, name: str) -> Any:
    if not isinstance(value, Mapping) or "answer" not in value:
        raise BadRow(f"{name} without an answer")
    return value["answer"]


_PPE = {"MMLU-Pro": "mmlu", "MATH": "math", "GPQA": "gpqa", "IFEval": "ifeval", "MBPP-Plus": "mbpp"}


def _read_ppe(row: Row) -> Item:
    correct = [float(bool(value)) for value in _list(row, "scores")]
    responses = [_value(row, f"response_{number + 1}") for number in range(len(correct))]
    comparisons = []
    for pair in _list(row, "sampled_conflict_pairs"):
        one, two = (int(index) for index in pair)
        if not max(one, two) < len(correct) or correct[one] == correct[two]:
            raise BadRow(f"sampled_conflict_pairs with {one} and {two}, which are not a correct and a wrong response")
        comparisons.append(Comparison(one, two) if correct[one] else Comparison(two, one))
    subset = max(_PPE, key=lambda name: row.file.lower().rfind(_PPE[name]))  # folders above may have such names too
    return make_item(row, _value(row, "prompt"), responses, comparisons, subset=subset, quality=correct)


def _read_helpsteer3(row: Row) -> Item:
    overall = _value(row, "overall_preference")
    if overall not in range(-3, 4):
        raise BadRow(f"overall_preference {str(overall)[:20]}, which must be a whole number from -3 to 3")
    if not overall:
        raise SkippedRow("overall_preference that is a tie")
    better = 0 if overall < 0 else 1
    return make_item(
        row, _list(row, "context"), [_value(row, "response1"), _value(row, "response2")],
        [Comparison(better, 1 - better, margin=float(abs(overall)))], subset=str(row.values.get("domain", "")),
    )  # fmt: skip


def _read_llmbar(row: Row) -> Item:
    label = _value(row, "label")
    if label not in (1, 2):
        raise BadRow(f"label {str(label)[:20]}, which must be 1 or 2")
    found = re.findall(r"Natural|Neighbor|GPTInst|GPTOut|Manual", row.file)
    name = found[-1] if found else ""
    subset = name if name in ("", "Natural") else f"Adversarial/{name}"
    responses = [_value(row, "output_1"), _value(row, "output_2")]
    return make_item(row, _value(row, "input"), responses, [Comparison(label - 1, 2 - label)], subset=subset)


def _entries(*paths: str, split: str | None = None, subset: str | None = None) -> tuple[FileEntry, ...]:
    return tuple(FileEntry(path, split=split, subset=subset) for path in paths)


BENCHMARKS = {
    each.name: each
    for each in (
        Benchmark(
            "rewardbench", "RewardBench", _read_rewardbench, scores.rewardbench,
            _entries("allenai/reward-bench", split="filtered"), (("**/filtered*",),),
        ),
        Benchmark(
            "prior-sets", "the prior sets of RewardBench", _read_prior, scores.prior_sets,
            tuple(FileEntry("allenai/preference-test-sets", split=name) for name in scores.PRIOR_SETS),
            (tuple(f"**/{name}{end}" for name in scores.PRIOR_SETS for end in ("-*", ".*")),),
        ),
        Benchmark(
            "rewardbench-2", "RewardBench 2", _read_rewardbench2, scores.rewardbench2,
            _entries("allenai/reward-bench-2", split="test"), (("**/test*",),),
        ),
        Benchmark(
            "rm-bench", "RM-Bench", _read_rm_bench, scores.rm_bench,
            _entries("THU-KEG/RM-Bench/total_dataset.json"), (("**/total_dataset.json",), ("**/*_filtered.json",)),
        ),
        Benchmark(
            "judgebench", "JudgeBench", _read_judgebench, scores.judgebench,
            (FileEntry("ScalerLab/JudgeBench", split="gpt"), FileEntry("ScalerLab/JudgeBench", split="claude")),
            (("**/dataset=judgebench,response_model=*.jsonl",),),
        ),
        Benchmark(
            "rmb", "RMB", _read_rmb, scores.rmb, files=(("**/Pairwise_set/**/*.json", "**/BoN_set/**/*.json"),),
            home="https://github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark",
        ),
        Benchmark(
            "ppe-correctness", "PPE correctness", _read_ppe, scores.ppe,
            _entries(*(f"lmarena-ai/PPE-{name}-Best-of-K" for name in _PPE), split="train"),
        ),
        Benchmark(
            "helpsteer3", "HelpSteer3", _read_helpsteer3, scores.plain,
            _entries("nvidia/HelpSteer3", split="validation", subset="preference"), (("**/*validation*",),),
        ),
        Benchmark(
            "llmbar", "LLMBar", _read_llmbar, scores.llmbar, _entries("princeton-nlp/LLMBar"),
            (("**/LLMBar/Natural/dataset.json", "**/LLMBar/Adversarial/*/dataset.json"),
             ("**/Natural/dataset.json", "**/Adversarial/*/dataset.json")),
        ),
    )
}  # fmt: skip


def find_benchmark(name: str) -> Benchmark | None:
    """The benchmark of a name, however it is spelled (`RewardBench_2`, `reward-bench-2`); None for another name."""
    known = {_bare(each): benchmark for each, benchmark in BENCHMARKS.items()}
    known.update(ppe=BENCHMARKS["ppe-correctness"], preferencetestsets=BENCHMARKS["prior-sets"])
    return known.get(_bare(name))


def looks_like_benchmark(name: str) -> bool:
    """Whether a name is a misspelled name of a benchmark; short names are not."""
    bare = _bare(name)
    return len(bare) > 4 and bool(difflib.get_close_matches(bare, map(_bare, BENCHMARKS), n=1, cutoff=0.85))


def _bare(name: str) -> str:
    return re.sub(r"[-_ .]", "", name.lower())
