"""Time and memory of `rm-gallery show-data` on synthetic pairs.

    python benchmarks/show_data.py [--pairs 10000 100000] [--tokens] [--output FILE.json]

Each size runs in its own process, on a parquet file with about 15 words of prompt and 30 words a response; every
fiftieth pair is a copy, a near copy, a flipped copy or a leak into validation. --tokens adds a tokenizer (byte-level
BPE, trained at start) and a chat template. All files are in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
# Runs in the process that is measured: the report, then its peak of resident memory in bytes.
PROGRAM = """
import json, resource, sys
from rm_gallery.cli import main
status = main(["show-data", "--json", "--samples", "2", *sys.argv[1:]])
print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}), file=sys.stderr)
sys.exit(status)
"""


def sentences(draw: random.Random, vocabulary: list[str], words: int) -> str:
    """Words drawn with a bias to the first ones, some capitals and full stops."""
    chosen = [vocabulary[int(len(vocabulary) * draw.random() ** 2.5)] for _ in range(words)]
    for place in range(0, words, 9):
        chosen[place] = chosen[place].capitalize()
        chosen[place - 1] += "."
    return " ".join(chosen).rstrip(".") + "."


def rows(count: int, *, seed: int) -> Iterator[dict[str, Any]]:
    """Pairs with a known number of duplicates, near duplicates and flipped labels."""
    draw = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "er", "in")]
    vocabulary = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(20_000)]
    earlier: list[dict[str, Any]] = []
    for number in range(count):
        if earlier and number % 50 == 0:
            row = dict(draw.choice(earlier))
            kind = number // 50 % 3
            if kind == 1:
                row["chosen"] += " Indeed."
            elif kind == 2:
                row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
            yield row
            continue
        prompt = [{"role": "user", "content": sentences(draw, vocabulary, draw.randint(8, 22))}]
        row = {
            "prompt": prompt,
            "chosen": sentences(draw, vocabulary, draw.randint(15, 50)),
            "rejected": sentences(draw, vocabulary, draw.randint(10, 45)),
        }
        if len(earlier) < 5000:
            earlier.append(row)
        yield row


def write(path: Path, count: int, *, seed: int) -> None:
    """A parquet file, in groups of 10,000 rows so that memory stays flat."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer, part = None, []
    for number, row in enumerate(rows(count, seed=seed), start=1):
        part.append(row)
        if len(part) == 10_000 or number == count:
            table = pa.Table.from_pylist(part)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
            part = []
    if writer is not None:
        writer.close()


def make_tokenizer(folder: Path, data: Path) -> Path:
    """A small byte-level BPE tokenizer with a chat template."""
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = pq.read_table(data, columns=["chosen"])["chosen"].slice(0, 20_000).to_pylist()
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def measure(arguments: list[str]) -> dict[str, Any]:
    """Seconds, peak bytes and some figures of one run."""
    start = time.perf_counter()
    ran = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if ran.returncode:
        sys.exit(ran.stderr)
    report = json.loads(ran.stdout)
    found = {each["key"]: each["count"] for each in (*report["splits"][0]["duplicates"], *report["leakage"])}
    baselines = {f"{each['key']}, {each['on']}": each["accuracy"] for each in report["baselines"]["baselines"]}
    peak = json.loads(ran.stderr.splitlines()[-1])["peak"]
    return {"seconds": seconds, "peak_bytes": peak, "found": found, "baselines": baselines}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of rm-gallery show-data on synthetic pairs.")
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--tokens", action="store_true", help="with a tokenizer and a chat template")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder / "val.parquet", 2000, seed=0)  # the same seed: it shares its first rows with training
        for count in options.pairs:
            write(folder / "train.parquet", count, seed=0)
            arguments = [f"data.train_files={folder}/train.parquet", f"data.val_files={folder}/val.parquet"]
            if options.tokens:
                model = make_tokenizer(folder / "model", folder / "train.parquet")
                arguments.append(f"model.partial_pretrain={model}")
            result = {"pairs": count, "tokens": options.tokens, **measure(arguments)}
            results.append(result)
            print(
                f"{count:>9,} pairs  {result['seconds']:7.1f} s  {result['seconds'] / count * 1e6:6.0f} us a pair  "
                f"{result['peak_bytes'] / 2**20:7.0f} MiB  {result['found']}",
                flush=True,
            )
    if options.output:
        options.output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
