"""What evaluating costs beyond scoring, and how fast a report of many scored pairs is made.

    python benchmarks/evaluation.py --model FOLDER --data FILE [--rows 2000] [--rounds 3]

Rounds of `rm-gallery score` and `evaluate` (without probes and baselines) on the same rows alternate, in one process
with one thread; times are CPU seconds, so that other work on the machine does not count. Probes and baselines cost the
same whatever the size of the set, and are measured once. A report of 100,000 pairs is made with a function as model.
"""

from __future__ import annotations

import argparse
import logging
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any


def cpu_seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def write_rows(source: Path, target: Path, count: int) -> Path:
    """The first rows of a file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = list(islice((row for batch in pq.ParquetFile(source).iter_batches() for row in batch.to_pylist()), count))
    pq.write_table(pa.Table.from_pylist(rows), target)
    return target


def made_up_pairs(count: int) -> list[dict[str, str]]:
    draw = random.Random(0)
    words = ["river", "stone", "cloud", "bread", "letter", "engine", "garden", "window", "music", "winter", "paper"]
    return [
        {
            "prompt": f"{number // 2} " + " ".join(draw.choices(words, k=20)),
            "chosen": " ".join(draw.choices(words, k=draw.randint(20, 120))),
            "rejected": " ".join(draw.choices(words, k=draw.randint(20, 120))),
        }
        for number in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="parquet file with pairs")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=100_000, help="of the report with a function as model")
    arguments = parser.parse_args()

    import torch

    from rm_gallery import RewardScorer, evaluate
    from rm_gallery.log import setup_logging
    from rm_gallery.scoring.score_files import ScoreOptions, score_files

    setup_logging(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_rows(arguments.data, folder / "rows.parquet", arguments.rows)
        scorer = RewardScorer.from_folder(arguments.model, device="cpu")

        def score(number: int) -> None:
            output = str(folder / f"scored-{number}.parquet")
            score_files(ScoreOptions(models=(arguments.model,), inputs=(str(data),), output=output, device="cpu"))

        times: list[tuple[float, float]] = []
        for number in range(arguments.rounds):
            load = cpu_seconds(lambda: RewardScorer.from_folder(arguments.model, device="cpu"))
            scoring = cpu_seconds(lambda number=number: score(number)) - load  # type: ignore[misc]
            evaluating = cpu_seconds(lambda: evaluate(scorer, data, probes=False, baselines=False))
            times.append((scoring, evaluating))
            figures = f"load {load:.2f} s, score {scoring:.2f} s, evaluate {evaluating:.2f} s"
            print(f"{figures}, ratio {evaluating / scoring:.3f}")
        ratio = statistics.median(evaluating / scoring for scoring, evaluating in times)
        print(f"evaluating {arguments.rows:,} pairs costs {ratio:.3f} times scoring them (median of {len(times)})")
        plain = statistics.median(evaluating for _, evaluating in times)
        probes = cpu_seconds(lambda: evaluate(scorer, data, baselines=False)) - plain
        baselines = cpu_seconds(lambda: evaluate(scorer, data, probes=False)) - plain
        print(f"beyond that: probes {probes:.2f} s, baselines {baselines:.2f} s")
        rows = made_up_pairs(arguments.pairs)
        began, began_cpu = time.perf_counter(), time.process_time()
        found = evaluate(lambda found: [len(each[-1]["content"]) for each in found], rows)
        evaluated = time.process_time() - began_cpu
        found.save(folder / "report.html")
        wall, cpu = time.perf_counter() - began, time.process_time() - began_cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        size = (folder / "report.html").stat().st_size / 2**10
        print(
            f"report of {arguments.pairs:,} pairs: {wall:.1f} s ({cpu:.1f} s of processor time), peak {peak:,.0f} MiB"
        )
        print(f"its page: {cpu - evaluated:.2f} s of processor time, {size:,.0f} KiB")


if __name__ == "__main__":
    main()
