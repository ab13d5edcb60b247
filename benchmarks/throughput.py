"""Training speed side by side: ours, TRL, and padding every text to `max_length`; in one go, in turns.

    python -m benchmarks.throughput --peer-python PYTHON_WITH_TRL [--data FOLDER] [--sets NAME ...] [--dtypes bf16 fp32]
                                    [--systems ours trl padded] [--pairs 192] [--repeats 3] [--size 25m]
                                    [--output FILE.json]

FOLDER holds hh_harmless_test, ultrafeedback_1k_train, gsm8k_solutions and ethics_util_train (parquet; prompt, chosen,
rejected); without it chats are made up. TRL needs an environment of its own (torch, transformers, trl, datasets,
pyarrow). All train the same random Qwen2 model with the same tokenizer on the same pairs as chats, 32 pairs a step,
AdamW at 1e-4, in processes of their own, one after the other, in another order each time.

Ours shuffles prompts instead of pairs (`data.keep_prompts_together`), which matters where a prompt has several pairs.
TRL gets the fastest of three micro-batch sizes; ours gets as many tokens a micro-batch as TRL's holds on average, with
its padding. `padded` is a plain loop over the library's model that pads to 4,096 tokens, one pair a micro-batch; it
trains few pairs, since each costs the same. Counted are the seconds of training steps, not of loading. The share of the
matrix rate is that of operations on unique tokens (forward and backward, nothing for padding or repeated prompts, the
last layer only where a reward needs it), against products of the model's shapes timed before and after, in the same
process. Peak memory is the highest resident memory of the process less what it held before the model was loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import throughput_systems
from benchmarks.throughput_inputs import SETS, write_inputs

ROOT = Path(__file__).resolve().parents[1]
MICRO_BATCHES = (4, 8, 16)  # pairs, of which TRL gets the fastest
NUM_PADDED = 4  # pairs that `padded` trains


def run_system(options: argparse.Namespace, folder: Path, system: str, dtype: str, **more: Any) -> dict[str, Any]:
    """One measurement in a process of its own: the record that it prints last."""
    python = options.peer_python if system == "trl" else sys.executable
    arguments = json.dumps({"folder": str(folder), "dtype": dtype, **more})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [python, throughput_systems.__file__, system, arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{system} failed:\n{done.stderr[-4000:]}")
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def measure(options: argparse.Namespace, folder: Path, dtype: str) -> dict[str, list[dict[str, Any]]]:
    """Records by system, one for each repeat."""
    micro_batch = MICRO_BATCHES[1]
    if "trl" in options.systems:
        trials = {size: run_system(options, folder, "trl", dtype, micro_batch=size) for size in MICRO_BATCHES}
        micro_batch = max(trials, key=lambda size: trials[size]["pairs_per_second"])
        tokens = trials[micro_batch]["micro_batch_tokens"]
    else:
        tokens = 4096
    more: dict[str, dict[str, Any]] = {
        "ours": {"token_budget": round(tokens)},
        "trl": {"micro_batch": micro_batch},
        "padded": {"pairs": NUM_PADDED},
    }
    found: dict[str, list[dict[str, Any]]] = {system: [] for system in options.systems}
    draw = random.Random(0)
    for _ in range(options.repeats):
        for system in draw.sample(options.systems, len(options.systems)):
            found[system].append(run_system(options, folder, system, dtype, **more[system]))
            print(f"  {system}: {found[system][-1]}", file=sys.stderr)
    return found


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def summarize(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, str]]:
    """A line of the table for each system. Ratios pair the runs of one repeat, which stood next to each other."""
    lines = []
    for system, records in found.items():
        line = {
            "system": system,
            "pairs/s": spread([each["pairs_per_second"] for each in records]),
            "tokens/s": f"{statistics.median(each['tokens_per_second'] for each in records):,.0f}",
            "matrix rate": f"{statistics.median(each['matrix_share'] for each in records):.0%}"
            if "matrix_share" in records[0] else "",
            "peak MiB": f"{statistics.median(each['peak_mib'] for each in records):,.0f}",
        }  # fmt: skip
        if system != "ours" and "ours" in found:
            pairs = list(zip(found["ours"], records, strict=True))
            line["ours / it"] = spread([a["pairs_per_second"] / b["pairs_per_second"] for a, b in pairs])
            line["memory ours / it"] = spread([a["peak_mib"] / b["peak_mib"] for a, b in pairs])
        lines.append(line)
    return lines


def show(title: str, lines: list[dict[str, str]]) -> None:
    names = list(dict.fromkeys(name for line in lines for name in line))
    widths = {name: max(len(name), *(len(line.get(name, "")) for line in lines)) for name in names}
    print(f"\n{title}")
    print("  ".join(name.ljust(widths[name]) for name in names))
    for line in lines:
        print("  ".join(line.get(name, "").ljust(widths[name]) for name in names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--peer-python", default="")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--systems", nargs="+", default=["ours", "trl", "padded"], choices=["ours", "trl", "padded"])
    parser.add_argument("--pairs", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", default="25m", choices=["tiny", "25m"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if "trl" in options.systems and not options.peer_python:
        parser.error("--peer-python names the python of an environment with TRL; or leave trl out of --systems")
    everything: dict[str, Any] = {}
    for name in options.sets:
        with tempfile.TemporaryDirectory() as folder:
            count = write_inputs(Path(folder), options.data, name, options.pairs, options.size)
            for dtype in options.dtypes:
                found = measure(options, Path(folder), dtype)
                everything[f"{name} {dtype}"] = found
                show(f"{name}, {dtype}, {count} pairs, {options.repeats} repeats", summarize(found))
                if options.output:
                    options.output.write_text(json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
    main()
