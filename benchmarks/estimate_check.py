"""How far `rm-gallery estimate` is off: its peak against the peak that training took, for a row of small runs.

    python -m benchmarks.estimate_check [--rows NAME ...] [--output FILE.json]

Each row trains two steps of a random model on made-up pairs in processes of their own, through the same entry as
`rm-gallery train`. On CPUs the measure is the highest resident memory before the first checkpoint, less what the
process held when it had trained a tiny model of the same kind, so that memory of libraries is on neither side, and
less pages of mapped files, which the system takes back when it needs them: the model's file stays mapped. Where there
is a GPU, `torch.cuda.max_memory_allocated`. Of several processes the largest value counts. glibc returns freed
blocks of 64 KiB and more at once (MALLOC_MMAP_THRESHOLD_): with its default, resident memory depends on the order in
which blocks were freed. Needs Linux and 6 GiB of free memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

_MIB = 2**20
_RECORD = "peak_of_rank_{}.json"


@dataclass(frozen=True)
class Row:
    """One run: a shape, a micro-batch, and how it is spread. Lengths in tokens."""

    name: str
    kind: str = "qwen2"
    sizes: dict[str, Any] = field(default_factory=dict)
    prompt: int = 100
    response: int = 100
    groups: int = 8
    """Pairs of one micro-batch."""
    micro_batches: int = 2
    """Of a step, on each process."""
    processes: int = 1
    settings: tuple[str, ...] = ()
    """Beside strategy, type and checkpointing, which have defaults of training."""


_BIG_VOCABULARY = {"vocab_size": 64000, "num_hidden_layers": 4}
_FP32 = "model.fsdp_config.model_dtype=fp32"
_CHECKPOINTED = "model.enable_gradient_checkpointing=true"
_LORA = "model.lora.rank=16"
ROWS = (
    Row("qwen2"),
    Row("qwen2 fp32", settings=(_FP32,)),
    Row("qwen2 checkpointed", settings=(_CHECKPOINTED,)),
    Row("qwen2 fp32 checkpointed", settings=(_FP32, _CHECKPOINTED)),
    Row("qwen2 one micro-batch", micro_batches=1),
    Row("qwen2 long texts", prompt=500, response=750, groups=1),
    Row("qwen2 large vocabulary", sizes=_BIG_VOCABULARY, groups=2),
    Row("qwen2 large vocabulary fp32", sizes=_BIG_VOCABULARY, groups=2, settings=(_FP32,)),
    Row("qwen2 lora", settings=(_LORA,)),
    Row("qwen2 lora fp32 checkpointed", settings=(_LORA, _FP32, _CHECKPOINTED)),
    Row("qwen2 qlora nf4", settings=(_LORA, "model.quantization=nf4")),
    Row("qwen2 lora fp32 2 pairs", groups=2, settings=(_LORA, _FP32)),
    Row("qwen2 qlora nf4 fp32 2 pairs", groups=2, settings=(_LORA, _FP32, "model.quantization=nf4")),
    Row("bert lora", kind="bert", settings=(_LORA,)),
    Row("qwen3", kind="qwen3"),
    Row("gemma3", kind="gemma3_text"),
    Row("qwen3_moe", kind="qwen3_moe"),
    Row("mixtral", kind="mixtral"),
    Row("bert", kind="bert"),
    Row("modernbert", kind="modernbert"),
    Row("deberta-v2 checkpointed", kind="deberta-v2", settings=(_CHECKPOINTED,)),
    Row("2 x ddp", processes=2, settings=("model.strategy=ddp",)),
    Row("2 x fsdp2", processes=2, settings=("model.strategy=fsdp2",)),
    Row("2 x fsdp2 fp32", processes=2, settings=("model.strategy=fsdp2", _FP32)),
    Row("2 x fsdp2 large vocabulary", sizes=_BIG_VOCABULARY, groups=2, processes=2, settings=("model.strategy=fsdp2",)),
    Row("4 x fsdp2", processes=4, groups=4, settings=("model.strategy=fsdp2",)),
    Row("4 x hybrid", processes=4, groups=4, settings=("model.strategy=fsdp2", "model.fsdp_config.fsdp_size=2")),
)


# These run only when they are named: 12 GiB of free memory.
LARGE = (
    Row(
        "qwen2.5-0.5b checkpointed",
        sizes={
            "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14,
        },
        groups=2,
        settings=(_CHECKPOINTED,),
    ),
)  # fmt: skip
_TINY: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "pooler_hidden_size": 64,
}  # fmt: skip


def make_model(row: Row, folder: Path) -> None:
    """A random model of the row's shape, some 30 million parameters, with a byte tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

    from rm_gallery.modeling.model_folder import quiet_transformers

    torch.manual_seed(0)
    vocabulary = {
        token: index for index, token in enumerate(["<|pad|>", "<|end|>", *pre_tokenizers.ByteLevel.alphabet()])
    }
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>").save_pretrained(folder)
    sizes: dict[str, Any] = {
        "vocab_size": 2000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
        "num_attention_heads": 8, "max_position_embeddings": 2048, "pad_token_id": 0, "num_labels": 1,
    }  # fmt: skip
    if row.kind in ("qwen2", "qwen3", "gemma3_text"):
        sizes |= {"num_key_value_heads": 2, "head_dim": 64, "bos_token_id": None, "eos_token_id": 1}
    if row.kind in ("qwen3_moe", "mixtral"):
        sizes |= {"num_key_value_heads": 2, "head_dim": 64, "num_experts_per_tok": 2, "num_experts": 8}
        sizes |= {"num_local_experts": 8, "moe_intermediate_size": 256, "intermediate_size": 256}
    if row.kind == "deberta-v2":
        sizes |= {"relative_attention": True, "position_buckets": 64, "pos_att_type": ["p2c", "c2p"]}
        sizes |= {"pooler_hidden_size": 512}
    if row.kind == "modernbert":
        sizes |= {"cls_token_id": 0, "sep_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(row.kind, **{**sizes, **row.sizes})
    with quiet_transformers():
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)


def prepare(row: Row, folder: Path) -> list[str]:
    """Write model, data and settings of a run into the folder; the settings, the same for training and estimate."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    make_model(row, folder / "model")
    folder.mkdir(exist_ok=True)
    pairs = row.groups * row.micro_batches * row.processes
    tail = "x" * (row.response - 1)
    texts = [f"{number:05d}" + "p" * (row.prompt - 5) for number in range(pairs)]
    columns = {name: [text + letter + tail for text in texts] for name, letter in (("chosen", "a"), ("rejected", "b"))}
    pq.write_table(pa.table(columns), folder / "pairs.parquet")
    is_padded = row.kind in ("bert", "modernbert", "deberta-v2")
    tokens = 2 * (row.prompt + row.response) if is_padded else row.prompt + 2 * row.response
    settings = [
        f"model.partial_pretrain={folder / 'model'}",
        f"data.train_files={folder / 'pairs.parquet'}",
        "data.input_style=text",
        f"data.max_length={row.prompt + row.response}",
        f"data.max_tokens_per_micro_batch={row.groups * tokens}",
        f"data.train_batch_size={pairs}",
        "trainer.total_training_steps=2",
        f"trainer.default_local_dir={folder}",
        *row.settings,
    ]
    (folder / "settings.json").write_text(json.dumps(settings))
    return settings


def train(folder: Path) -> None:
    """One process of a row: train, and write the peak beside the data when the first checkpoint is due."""
    import torch

    from rm_gallery.errors import UserError
    from rm_gallery.training.checkpoint import Checkpoints
    from rm_gallery.training.config import load_config
    from rm_gallery.training.setup import run_training

    def settings(name: str) -> list[str]:
        return json.loads((folder / name / "settings.json").read_text())

    try:
        run_training(load_config(None, settings("tiny")))  # libraries take what they need
    except UserError as error:
        sys.exit(str(error))
    before, files_before = _kib("VmRSS"), _kib("RssFile")
    save = Checkpoints.save
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    def recording(self: Checkpoints, *arguments: Any, **options: Any) -> Any:
        peak = 1024 * (_kib("VmHWM") - before - (_kib("RssFile") - files_before))
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        (folder / _RECORD.format(os.environ.get("RANK", "0"))).write_text(json.dumps(peak))
        return save(self, *arguments, **options)

    Checkpoints.save = recording  # type: ignore[method-assign]
    run_training(load_config(None, settings("full")))


def _kib(name: str) -> int:
    """A line of what the system says of this process: VmRSS now, RssFile of it mapped files, VmHWM its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def run(row: Row) -> dict[str, Any]:
    """Estimate and measurement of a row in bytes, or why it could not be trained."""
    from rm_gallery.planning.config import load_estimate_config
    from rm_gallery.planning.estimate import estimate

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(replace(row, sizes={**row.sizes, **_TINY}), folder / "tiny")
        settings = prepare(row, folder / "full")
        command = [sys.executable, "-m", "benchmarks.estimate_check", "--train", name]
        if row.processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={row.processes}"]
            command = [sys.executable, *launcher, *command[1:]]
        environment = {
            "OMP_NUM_THREADS": "1", **os.environ, "MALLOC_MMAP_THRESHOLD_": "65536",
            "PYTHONPATH": os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH")))),
        }  # fmt: skip
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
        peaks = [json.loads(file.read_text()) for file in folder.glob(_RECORD.format("*"))]
        if len(peaks) < row.processes:
            lines = [line for line in ran.stderr.splitlines() if line.strip()] or ["no reason given"]
            told = [line for line in lines if "rank0" not in line and "processes" in line] or lines[-1:]
            return {"name": row.name, "why_not": told[0][:150]}
        found = estimate(load_estimate_config(None, [*settings, f"n_gpus={row.processes}", "gpu=cpu"]))
        expected = found.memory.total - found.memory.overhead
        measured = max(peaks)
        return {
            "name": row.name,
            "processes": row.processes,
            "parameters": found.shape.parameters,
            "tokens": found.micro_batch,
            "moment": found.memory.moment,
            "estimate": expected,
            "measured": measured,
            "error": expected / measured - 1,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", nargs="+", metavar="NAME", help=f"only these; also {LARGE[0].name!r}, which needs 12 GiB"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train)
        return
    print(f"{'run':<30} {'parameters':>11} {'tokens':>7} {'estimate':>9} {'measured':>9}  MiB   error  peak when")
    results = []
    for row in [row for row in (*ROWS, *LARGE) if row.name in (arguments.rows or [each.name for each in ROWS])]:
        found = run(row)
        results.append(found)
        if "why_not" in found:
            print(f"{row.name:<30} not trained: {found['why_not']}", flush=True)
            continue
        print(
            f"{row.name:<30} {found['parameters'] / 1e6:>10.1f}M {found['tokens']:>7} {found['estimate'] / _MIB:>9.0f} "
            f"{found['measured'] / _MIB:>9.0f} {found['error']:>+11.1%}  {found['moment']}",
            flush=True,
        )
    errors = [found for found in results if "error" in found]
    if errors:
        worst = max(errors, key=lambda found: abs(found["error"]))
        print(f"worst: {worst['error']:+.1%} ({worst['name']}), of {len(errors)} runs")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
