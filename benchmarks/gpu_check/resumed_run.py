"""A run with checkpoints in a process of its own: killed at a step, or resumed from the newest checkpoint.

    python -m benchmarks.gpu_check.resumed_run MODEL SIZE DEVICE KILL_AT DTYPE RUN_DIR

KILL_AT is the step after which the process kills itself; 0 trains to the end. `training` starts it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.small_model import SIZES, Curve, Setup, Size, model_config, set_up
from rm_gallery.data.tokenization.tokenizer import load_tokenizer
from rm_gallery.distributed.collectives import HostGroup
from rm_gallery.distributed.process_group import World
from rm_gallery.modeling.export import InputRecord
from rm_gallery.modeling.parallel.apply import DTYPES
from rm_gallery.training.checkpoint import Checkpoints, RunIdentity, Start, WeightsFolder, find_start
from rm_gallery.training.trainer_config import TrainerConfig

RESULT, _CURVE = "result.json", "curve.jsonl"


def train_with_checkpoints(
    folder: Path, size: Size, device: torch.device, dtype: str, run_dir: Path, *, kill_at: int = 0
) -> dict[str, Any]:
    """Losses of all steps by step, also of earlier processes, and a hash of the master weights."""
    run_dir.mkdir(parents=True, exist_ok=True)

    def record(step: int) -> None:
        with (run_dir / _CURVE).open("a") as out:
            out.write(json.dumps([step, curve.losses[-1]]) + "\n")
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def checkpoints(run: Setup) -> tuple[Start, Checkpoints]:
        ranks = HostGroup(World(0, 1, device))
        identity = RunIdentity({}, {}, size.steps, lambda total_steps, step: 1.0)
        start = find_start(run_dir, "auto", identity, run.tensors, ranks)
        weights = WeightsFolder(
            run.trainer.model, load_tokenizer(str(folder)), InputRecord("text"), DTYPES[dtype], device,
            exact=dtype == "fp32", probes=[run.data[index] for index in range(4)],
        )  # fmt: skip
        facts = identity.facts(start.origin)
        return start, Checkpoints(
            run_dir, TrainerConfig(), run.tensors, weights, ranks, facts=facts, latest=start.folder
        )

    curve = Curve(on_step=record)
    save_freq = max(1, size.steps // 3)
    run = set_up(folder, size, device, model_config(dtype), curve=curve, save_freq=save_freq, checkpoints=checkpoints)
    run.trainer.train()
    digest = hashlib.sha256()
    for _, weight in run.trainer.weights.named_parameters():
        digest.update(weight.detach().cpu().numpy().tobytes())
    lines = [json.loads(line) for line in (run_dir / _CURVE).read_text().splitlines()]
    found = {"losses": {str(step): loss for step, loss in lines}, "weights": digest.hexdigest(), "steps": len(lines)}
    found.pop("steps")
    (run_dir / RESULT).write_text(json.dumps(found))
    return found


def main() -> None:
    model, size, device, kill_at, dtype, run_dir = sys.argv[1:]
    train_with_checkpoints(Path(model), SIZES[size], torch.device(device), dtype, Path(run_dir), kill_at=int(kill_at))


if __name__ == "__main__":
    main()
