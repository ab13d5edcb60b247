"""A row of each benchmark as it is published, and local copies made of such rows."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_A, _B = "a 2", "b 1"
ROWS: dict[str, tuple[str, Any]] = {
    "rewardbench": ("filtered.jsonl", {"prompt": "p", "chosen": _A, "rejected": _B, "subset": "hep-go"}),
    "prior-sets": ("shp-0.jsonl", {"prompt": [{"role": "user", "content": "p"}], "chosen": _A, "rejected": _B}),
    "rewardbench-2": (
        "test.jsonl",
        {"id": "1", "prompt": "p", "chosen": [_A], "rejected": [_B] * 3, "subset": "Focus", "num_correct": 1},
    ),
    "rm-bench": (
        "total_dataset.json",
        {"id": "1", "prompt": "p", "chosen": [_A] * 3, "rejected": [_B] * 3, "domain": "safety-refuse"},
    ),
    "judgebench": (
        "dataset=judgebench,response_model=x.jsonl",
        {
            "source": "mmlu-pro-law",
            "question": "p",
            "response_model": "x",
            "response_A": _B,
            "response_B": _A,
            "label": "B>A",
        },
    ),
    "rmb": (
        "BoN_set/Harmlessness/S1.json",
        {
            "conversation_input": [{"role": "user", "content": "p", "language": "English"}],
            "bon_best": {"llm_name": "x", "answer": _A},
            "loser_list": [{"llm_name": "y", "answer": _B}],
            "category_path": "BoN_set/Harmlessness/S1",
        },
    ),
    "ppe-correctness": (
        "PPE-MATH-Best-of-K.jsonl",
        {
            "prompt": "p",
            "response_1": _B,
            "response_2": _A,
            "scores": [False, True],
            "sampled_conflict_pairs": [[0, 1]],
        },
    ),
    "helpsteer3": (
        "validation.jsonl",
        {
            "context": [{"role": "user", "content": "p"}],
            "response1": _B,
            "response2": _A,
            "overall_preference": 2,
            "domain": "code",
        },
    ),
    "llmbar": (
        "LLMBar/Adversarial/GPTOut/dataset.json",
        {"input": "p", "output_1": _B, "output_2": _A, "label": 2},
    ),
}
"""File in the published folder, and a row."""
SUBSETS = {
    "rewardbench": "hep-go",
    "prior-sets": "shp",
    "rewardbench-2": "Focus",
    "rm-bench": "safety",
    "judgebench": "x mmlu-pro",
    "rmb": "BoN_set/Harmlessness",
    "ppe-correctness": "MATH accuracy",
    "helpsteer3": "code",
    "llmbar": "Adversarial/GPTOut",
}
"""Name of the part that such a row counts for."""
_WORDS = ("river", "stone", "cloud", "bread", "letter", "engine", "garden", "window", "music", "winter", "paper")


def write_copy(name: str, rows: Sequence[Any], folder: str = "copy") -> Path:
    """A local copy of a benchmark with these rows."""
    file = ROWS[name][0]
    path = Path(folder) / file
    path.parent.mkdir(parents=True)
    is_list = file.endswith(".json")
    path.write_text(json.dumps(list(rows)) if is_list else "".join(f"{json.dumps(row)}\n" for row in rows))
    (Path(folder) / "README.md").write_text("not data")
    return Path(folder)


def varied(name: str, count: int) -> list[Any]:
    """Rows of a benchmark that differ in all of their texts."""
    draw = random.Random(name)

    def texts(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: texts(each) for key, each in value.items()}
        if isinstance(value, list):
            return [texts(each) for each in value]
        return " ".join(draw.choices(_WORDS, k=draw.randint(2, 7))) if value in (_A, _B, "p") else value

    return [texts(ROWS[name][1]) for _ in range(count)]
