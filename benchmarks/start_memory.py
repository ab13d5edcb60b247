"""Peak memory of each process: while a run starts, in steady state, and while it writes a checkpoint.

    python benchmarks/start_memory.py [--processes 1 2 4] [--strategies fsdp2 ...] [--dtype bf16] [--output FILE.json]

A random model of the shape of Qwen2.5-0.5B (494M parameters) is trained for a few steps through the ordinary trainer,
under torchrun on the CPU. Counted is a process's own memory (RssAnon of /proc, sampled every 10 ms): pages of files
that are read through the page cache belong to all. Start-up ends when the weights are in place, before the optimizer
exists; steady state is from the second step on. A checkpoint loads the folder again in rank 0, to compare rewards.
glibc returns freed blocks of 1 MiB or more to the system (MALLOC_MMAP_THRESHOLD_): with its default it kept 0.7 GiB
of free blocks in a run that used 1.6 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True,
    "initializer_range": 0.02,
}  # fmt: skip
KEEP_NOTHING = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
PHASES = ("imports", "start-up", "steady", "checkpoint")


def own_memory() -> int:
    """Bytes of this process that belong to no file."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this needs Linux 4.5 or newer")


class Peaks:
    """Largest memory of each phase, sampled by a thread."""

    def __init__(self) -> None:
        self.phase = PHASES[0]
        self.bytes = dict.fromkeys(PHASES, 0)
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self.bytes[self.phase] = max(self.bytes[self.phase], own_memory())
            time.sleep(0.01)


def work(folder: Path, strategy: str, dtype: str, steps: int) -> None:
    """One process: a run whose phases are marked from outside."""
    peaks = Peaks()
    from rm_gallery.cli import main
    from rm_gallery.training import setup
    from rm_gallery.training.checkpoint import Checkpoints
    from rm_gallery.training.trainer import Trainer

    apply, save, step = setup.apply, Checkpoints.save, Trainer.train_step

    def marked_apply(*arguments: Any, **options: Any) -> Any:
        result = apply(*arguments, **options)
        peaks.phase = "between"
        return result

    def marked_step(*arguments: Any) -> Any:
        result = step(*arguments)
        peaks.phase = "steady"
        return result

    def marked_save(*arguments: Any, **options: Any) -> Any:
        peaks.phase = "checkpoint"
        return save(*arguments, **options)

    peaks.bytes["between"] = 0
    setup.apply, Checkpoints.save, Trainer.train_step = marked_apply, marked_save, marked_step  # type: ignore[assignment]
    time.sleep(0.1)
    peaks.phase = "start-up"
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    status = main([
        "train", f"model.partial_pretrain={folder / 'model'}", f"model.fsdp_config.model_dtype={dtype}",
        f"model.strategy={strategy}", f"data.train_files={folder / 'train.parquet'}", "data.max_length=64",
        "data.train_batch_size=8", "data.max_tokens_per_micro_batch=4096", "trainer.device=cpu",
        f"trainer.total_training_steps={steps}",
        f"trainer.default_local_dir={folder}", f"trainer.experiment_name={strategy}-{world_size}",
    ])  # fmt: skip
    if status:
        sys.exit(status)
    (folder / f"peaks-{strategy}-{world_size}-{rank}.json").write_text(json.dumps(peaks.bytes))


def make_inputs(folder: Path) -> int:
    """A model folder in bfloat16 and a few pairs; returns the number of parameters."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sys.path.insert(0, str(ROOT))
    from tests.small import make_tokenizer, text_pairs, write_pairs

    tokenizer = make_tokenizer()
    config = Qwen2Config(**SHAPE, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_pairs(folder / "train.parquet", text_pairs(32))
    return sum(parameter.numel() for parameter in model.parameters())


def check_room(count: int, processes: int) -> None:
    """Stop rather than push this machine into killing processes."""
    with open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    needed = 20 * count + int(1.5 * 2**30) * processes
    if needed > free:
        sys.exit(f"{processes} processes need about {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free")


def launch(folder: Path, strategy: str, processes: int, dtype: str, steps: int) -> list[dict[str, int]]:
    """Peaks of each rank."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", __file__,
        "--work", str(folder), "--strategies", strategy, "--dtype", dtype, "--steps", str(steps),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **KEEP_NOTHING}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{strategy} on {processes} processes failed:\n{done.stderr[-3000:]}")
    files = [folder / f"peaks-{strategy}-{processes}-{rank}.json" for rank in range(processes)]
    return [json.loads(file.read_text()) for file in files]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--strategies", nargs="+", default=["fsdp2"])
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.strategies[0], arguments.dtype, arguments.steps)
        return
    results = []
    with tempfile.TemporaryDirectory() as name:
        count = make_inputs(Path(name))
        print(
            f"{count / 1e6:.0f}M parameters, {arguments.dtype}; the largest process of each run, GiB of its own memory"
        )
        print(f"{'strategy':10}{'processes':>10}" + "".join(f"{phase:>12}" for phase in PHASES))
        for strategy in arguments.strategies:
            for processes in arguments.processes:
                check_room(count, processes)
                peaks = launch(Path(name), strategy, processes, arguments.dtype, arguments.steps)
                largest = {phase: max(peak[phase] for peak in peaks) for phase in PHASES}
                results.append({"strategy": strategy, "processes": processes, "ranks": peaks})
                print(
                    f"{strategy:10}{processes:>10}" + "".join(f"{largest[p] / 2**30:12.2f}" for p in PHASES), flush=True
                )
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"parameters": count, "dtype": arguments.dtype, "runs": results}, indent=2)
        )


if __name__ == "__main__":
    main()
