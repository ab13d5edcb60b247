"""Memory and time of the data path for made chat pairs: 10 thousand, 100 thousand, one million.

    python -m benchmarks.data_scale [--pairs 10000 100000 1000000] [--folder FOLDER] [--tokenizer FOLDER] [--json FILE]

For each size: the time from the start of the command to the first training step, with nothing in the cache and then
again; the highest proportional memory (PSS) of the whole process tree, with the mapped cache files apart; and rows a
second on one core, with templating, against the tokenizer library alone on the same texts, rendered before; and the
time to verify the cache at each start, in percent of the time to read and tokenize the same data. `--pairs` without a
number prints only the figures for one core.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ROWS_AT_ONCE = 10_000
_RATE_ROWS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--words", type=int, default=90, help="median words of a response (default: %(default)s)")
    parser.add_argument("--folder", help="where data and cache are written; default: a temporary folder")
    parser.add_argument("--tokenizer", help="folder of a tokenizer with a chat template; default: one is trained")
    parser.add_argument("--json", help="write the figures there too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        model = make_model(folder / "model", arguments.tokenizer, arguments.words)
        rates = measure_rates(folder, model, arguments.words)
        print(
            f"one core: tokenizer library alone {rates['library']:.0f} texts/s, ours with templating "
            f"{rates['ours']:.0f} texts/s: {rates['ratio']:.2f} ({rates['lowest']:.2f} to {rates['highest']:.2f})"
        )
        cache = measure_verification(folder, model, arguments.words)
        print(
            f"cache of {cache['mb']:.0f} MB: tokenized in {cache['tokenize_s']:.1f} s on one core, hashed and written "
            f"in {cache['write_s']:.2f} s, verified in {cache['verify_s']:.2f} s ({cache['verify_gb_s']:.2f} GB/s): "
            f"{100 * cache['verify_s'] / cache['tokenize_s']:.2f}% of tokenizing"
        )
        rows = [measure(folder, model, count, arguments.words) for count in arguments.pairs]
    if rows:
        print_table(rows)
    if arguments.json:
        found = {"rates": rates, "verification": cache, "sizes": rows}
        Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n")


def make_text(draw: random.Random, vocabulary: list[str], words: int) -> str:
    count = max(4, int(draw.lognormvariate(0, 0.6) * words))
    return " ".join(draw.choices(vocabulary, k=count))


def make_vocabulary() -> list[str]:
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(draw.choices(letters, weights=range(26, 0, -1), k=draw.randint(2, 9))) for _ in range(20_000)]
    return words + [word.capitalize() + "." for word in words[:2000]]


def write_pairs(path: Path, count: int, words: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw, vocabulary = random.Random(1), make_vocabulary()
    writer = None
    for start in range(0, count, _ROWS_AT_ONCE):
        rows = [
            {
                "prompt": [{"role": "user", "content": make_text(draw, vocabulary, words // 2)}],
                "chosen": make_text(draw, vocabulary, words),
                "rejected": make_text(draw, vocabulary, words),
            }
            for _ in range(min(_ROWS_AT_ONCE, count - start))
        ]
        table = pa.Table.from_pylist(rows)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def make_model(folder: Path, tokenizer_folder: str | None, words: int) -> Path:
    """A model of one layer, so that the time to the first step is that of the data path and of imports."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    if tokenizer_folder:
        tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_folder)
    else:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        draw, vocabulary = random.Random(2), make_vocabulary()
        trainer = trainers.BpeTrainer(
            vocab_size=16_000,
            special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        backend.train_from_iterator((make_text(draw, vocabulary, words) for _ in range(3000)), trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
        tokenizer.chat_template = CHATML
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure_rates(folder: Path, model: Path, words: int, repeats: int = 5) -> dict[str, float]:
    """Texts a second on one core: the library's tokenizer alone, and rows to token arrays; interleaved."""
    from rm_gallery.data.sources import SourceConfig, read_chunks, resolve_files
    from rm_gallery.data.token_cache.row_processor import RowProcessor, RowsConfig, Work
    from rm_gallery.data.tokenization.tokenizer import load_tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    file = folder / "rates.parquet"
    write_pairs(file, _RATE_ROWS, words)
    tokenizer = load_tokenizer(str(model))
    processor = RowProcessor(Work(RowsConfig(), tokenizer))
    reader = processor.readers.get("prompt")
    [found] = resolve_files(SourceConfig(train_files=str(file)), key="data.train_files")
    rows = [row for chunk in read_chunks(found, key="data.train_files") for row in chunk.rows()]
    texts = [text for row in rows for text in processor.encoder.render(reader.read(row))]
    library, ours = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        for first in range(0, len(texts), 1000):
            tokenizer(texts[first : first + 1000], add_special_tokens=False)
        library.append(len(texts) / (time.perf_counter() - start))
        start = time.perf_counter()
        for chunk in read_chunks(found, key="data.train_files"):  # reading and splitting the prefix included
            processor.process(chunk.rows(), reader, "")
        ours.append(len(texts) / (time.perf_counter() - start))
    ratios = [mine / theirs for mine, theirs in zip(ours, library, strict=True)]
    return {
        "library": statistics.median(library), "ours": statistics.median(ours), "ratio": statistics.median(ratios),
        "lowest": min(ratios), "highest": max(ratios),
    }  # fmt: skip


def measure_verification(folder: Path, model: Path, words: int, repeats: int = 2) -> dict[str, float]:
    """Seconds to tokenize rows on one core, to write their tokens with hashes, and to verify them at the next start."""
    from rm_gallery.data.sources import SourceConfig, read_chunks, resolve_files
    from rm_gallery.data.token_cache.row_processor import RowProcessor, RowsConfig, Work
    from rm_gallery.data.token_cache.store import Facts, StoreWriter, open_store
    from rm_gallery.data.tokenization.tokenizer import load_tokenizer
    from rm_gallery.errors import Dropped

    [file] = resolve_files(SourceConfig(train_files=str(folder / "rates.parquet")), key="data.train_files")
    processor = RowProcessor(Work(RowsConfig(), load_tokenizer(str(model))))
    reader = processor.readers.get("prompt")
    seconds = {"tokenize_s": 0.0, "write_s": 0.0}
    with StoreWriter(folder / "store") as writer:
        for _ in range(repeats):
            start = time.perf_counter()
            made = [processor.process(chunk.rows(), reader, "").chunk for chunk in read_chunks(file, key="a")]
            seconds["tokenize_s"] += time.perf_counter() - start
            start = time.perf_counter()
            for _ in range(8):  # larger than a processor's caches
                for chunk in made:
                    writer.append(chunk)
            seconds["write_s"] += time.perf_counter() - start
        seconds["tokenize_s"] *= 8
        start = time.perf_counter()
        writer.finish(Facts("chat", False, [], 0, 0), Dropped())
        seconds["write_s"] += time.perf_counter() - start
    size = sum(path.stat().st_size for path in (folder / "store").iterdir()) / 1e6
    took = []
    for _ in range(5):
        start = time.perf_counter()
        open_store(folder / "store")
        took.append(time.perf_counter() - start)
    verify = statistics.median(took)
    return {"mb": size, **seconds, "verify_s": verify, "verify_gb_s": size / 1000 / verify}


def measure(folder: Path, model: Path, count: int, words: int) -> dict[str, Any]:
    """First and second start of a training run on `count` pairs."""
    file, cache = folder / f"{count}.parquet", folder / "cache"
    write_pairs(file, count, words)
    row: dict[str, Any] = {"pairs": count, "parquet_mb": file.stat().st_size / 1e6}
    for name in ("first", "second"):
        row[name] = start_training(folder / f"run-{count}-{name}", model, file, cache)
    row["cache_mb"] = sum(path.stat().st_size for path in cache.rglob("*.bin")) / 1e6
    shutil.rmtree(cache)
    file.unlink()
    return row


def start_training(run_dir: Path, model: Path, file: Path, cache: Path) -> dict[str, float]:
    """Train one step in a process of its own; seconds to that step, and the peak memory of it and its workers."""
    command = [
        sys.executable, "-m", "rm_gallery.cli", "train", f"model.partial_pretrain={model}", f"data.train_files={file}",
        f"data.cache_dir={cache}", "data.train_batch_size=8", "data.max_length=1024", "trainer.total_training_steps=1",
        f"trainer.default_local_dir={run_dir}", "trainer.experiment_name=run",
    ]  # fmt: skip
    began = time.time()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        peak = {"memory_mb": 0.0, "mapped_cache_mb": 0.0, "processes": 0.0}
        while process.poll() is None:
            for name, value in tree_memory(process.pid, cache).items():
                peak[name] = max(peak[name], value)
            time.sleep(0.3)
        _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"training failed:\n{errors}")
    first = json.loads((run_dir / "run" / "metrics.jsonl").read_text().splitlines()[0])
    return {"seconds_to_first_step": first["time"] - began, **peak}


def tree_memory(pid: int, cache: Path) -> dict[str, float]:
    """PSS of a process and all below it, in MB; pages of the mapped cache files apart."""
    total = mapped = 0.0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return {}
    for process in processes:
        try:
            text = Path(f"/proc/{process.pid}/smaps").read_text()
        except OSError:
            continue
        of_cache = False
        for line in text.splitlines():
            first = line.split(maxsplit=1)[0]
            if "-" in first and not first.endswith(":"):
                of_cache = str(cache) in line
            elif first == "Pss:":
                size = int(line.split()[1]) / 1000
                mapped += size if of_cache else 0
                total += 0 if of_cache else size
    return {"memory_mb": total, "mapped_cache_mb": mapped, "processes": float(len(processes))}


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| pairs | parquet | cache on disk | start | to first step | peak memory | mapped cache, apart | processes |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        for name in ("first", "second"):
            found = row[name]
            print(
                f"| {row['pairs']:,} | {row['parquet_mb']:.0f} MB | {row['cache_mb']:.0f} MB | {name} | "
                f"{found['seconds_to_first_step']:.1f} s | {found['memory_mb']:.0f} MB | "
                f"{found['mapped_cache_mb']:.0f} MB | {found['processes']:.0f} |"
            )


if __name__ == "__main__":
    main()
