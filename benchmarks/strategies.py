"""One table of all strategies: the same loss curve and validation figures, however many processes share the work.

    python benchmarks/strategies.py [--steps 30] [--only NAME ...] [--output FILE.json]

A tiny Qwen2 model is trained on made-up pairs in float32 at a learning rate of 1e-4 by one, two and four processes of
this machine (gloo, CPU); "two nodes" are two torchruns that meet over 127.0.0.1.
Printed are the largest differences to the run of one process: of the loss curve, the gradient norms, the figures of
three validations, and the weights of the exported folder.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Case:
    """A way to run: processes on each of so many nodes, and what the configuration says."""

    name: str
    processes: int
    settings: tuple[str, ...]
    nodes: int = 1

    @property
    def shown(self) -> str:
        where = f"{self.nodes} nodes x {self.processes}" if self.nodes > 1 else str(self.processes)
        return f"{where} x {self.name}"


ONE = Case("one", 1, ())
CASES = (
    Case("ddp", 2, ("model.strategy=ddp",)),
    Case("fsdp", 2, ("model.strategy=fsdp",)),
    Case("fsdp2", 2, ("model.strategy=fsdp2",)),
    Case("fsdp2-offload", 2, ("model.strategy=fsdp2", "model.fsdp_config.cpu_offload=true")),
    Case("fsdp2-hybrid", 4, ("model.strategy=fsdp2", "model.fsdp_config.fsdp_size=2")),
    Case("fsdp-hybrid", 4, ("model.strategy=fsdp", "model.fsdp_config.fsdp_size=2")),
    Case("fsdp2-nodes", 1, ("model.strategy=fsdp2",), nodes=2),
)


@dataclass(frozen=True)
class Difference:
    """Largest differences to the run of one process."""

    loss: float
    grad_norm: float
    validation: float
    """Of loss, accuracy and margin. Mean rewards are left out: a constant added to all rewards changes no loss, so
    rounding alone moves it."""
    weights: float


def make_inputs(folder: Path) -> None:
    """A model folder, 40 pairs to train on and 11 to validate: counts that two and four do not divide evenly."""
    sys.path.insert(0, str(ROOT))
    from tests.small import make_model, text_pairs, write_pairs

    make_model("qwen2", folder / "model")
    write_pairs(folder / "train.parquet", text_pairs(40))
    write_pairs(folder / "val.parquet", text_pairs(11, seed=2))


def arguments(folder: Path, case: Case, steps: int) -> list[str]:
    """Of `rm-gallery train`."""
    return [
        f"model.partial_pretrain={folder / 'model'}", "model.fsdp_config.model_dtype=fp32", "data.max_length=256",
        f"data.train_files={folder / 'train.parquet'}", f"data.val_files={folder / 'val.parquet'}",
        "data.train_batch_size=7", "data.max_tokens_per_micro_batch=512", "optim.lr=1e-4", "optim.weight_decay=0.1",
        f"trainer.total_training_steps={steps}", f"trainer.test_freq={max(1, steps // 3)}", "trainer.device=cpu",
        f"trainer.default_local_dir={folder}", f"trainer.experiment_name={case.name}", *case.settings,
    ]  # fmt: skip


def work(folder: Path, cases: list[Case], steps: int) -> None:
    """What each process does: one run after the other."""
    from rm_gallery.cli import main as rm_gallery

    for case in cases:
        if status := rm_gallery(["train", *arguments(folder, case, steps)]):
            sys.exit(status)


def fork(folder: Path, cases: list[Case], steps: int) -> None:
    """Make the processes of one machine from one that has loaded torch, which takes longer than their runs."""
    from rm_gallery.training import build

    assert build
    variables = {"WORLD_SIZE": str(cases[0].processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children = []
    for rank in range(cases[0].processes):
        child = os.fork()
        if not child:
            if len(cases) > 1 or cases[0] != ONE:
                os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
            work(folder, cases, steps)
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    if any(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children):
        sys.exit(1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(folder: Path, cases: list[Case], steps: int) -> None:
    """Run cases of equal processes and nodes in one start of them. Raises RuntimeError with the log when one fails."""
    nodes, processes = cases[0].nodes, cases[0].processes
    own = [__file__, "--folder", str(folder), "--steps", str(steps), "--only", *(case.name for case in cases)]
    commands = [[sys.executable, *own, "--mode", "fork"]]
    if nodes > 1:
        meeting = [f"--nnodes={nodes}", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
        run = [sys.executable, "-m", "torch.distributed.run", *meeting, f"--nproc_per_node={processes}"]
        commands = [[*run, f"--node_rank={node}", *own, "--mode", "work"] for node in range(nodes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    logs = [folder / f"{cases[0].name}.{node}.log" for node in range(nodes)]
    started = []
    for command, log in zip(commands, logs, strict=True):
        with log.open("wb") as output:
            started.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    try:
        failed = [log for process, log in zip(started, logs, strict=True) if process.wait(timeout=600)]
    finally:
        for process in started:
            process.kill()
    if failed:
        raise RuntimeError(
            f"{', '.join(case.shown for case in cases)}: {failed[0].read_text(errors='replace')[-4000:]}"
        )


def metrics(run: Path) -> dict[tuple[int, str], float]:
    """(step, name) -> value of a run's metrics.jsonl."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], name): value for row in rows for name, value in row.items() if "/" in name}


def compare(folder: Path, case: Case, steps: int) -> Difference:
    from safetensors.torch import load_file

    runs = [folder / ONE.name, folder / case.name]
    ours, theirs = (metrics(run) for run in runs)
    assert ours.keys() == theirs.keys(), f"{case.name} logs other metrics"

    def largest(*names: str) -> float:
        return max(abs(ours[key] - theirs[key]) for key in ours if key[1] in names)

    one, other = (load_file(run / f"global_step_{steps}/model.safetensors") for run in runs)
    assert one.keys() == other.keys(), f"{case.name} exports other tensors"
    return Difference(
        largest("train/loss"),
        largest("train/grad_norm"),
        largest("val/loss", "val/accuracy", "val/margin"),
        max((one[name] - other[name]).abs().max().item() for name in one),
    )


def run_table(folder: Path, cases: tuple[Case, ...] = CASES, steps: int = 30) -> dict[Case, Difference]:
    """Run one process and all cases, those with equal processes in one start of them; the differences by case."""
    make_inputs(folder)
    launches: dict[tuple[int, int], list[Case]] = {}
    for case in (ONE, *cases):
        launches.setdefault((case.nodes, case.processes), []).append(case)
    for together in launches.values():
        launch(folder, together, steps)
    return {case: compare(folder, case, steps) for case in cases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[case.name for case in (ONE, *CASES)])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=["table", "fork", "work"], default="table", help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = tuple(case for case in (ONE, *CASES) if not options.only or case.name in options.only)
    if options.mode != "table":
        (fork if options.mode == "fork" else work)(options.folder, list(chosen), options.steps)
        return
    with tempfile.TemporaryDirectory() as name:
        found = run_table(Path(name), tuple(case for case in chosen if case != ONE), options.steps)
        last = {key[1]: value for key, value in metrics(Path(name) / ONE.name).items() if key[0] == options.steps}
    print(f"float32, {options.steps} steps at 1e-4; differences to one process, whose figures are")
    print(", ".join(f"{key} {last[key]:.6f}" for key in ("train/loss", "val/loss", "val/accuracy", "val/margin")))
    print(f"{'':24}{'loss curve':>12}{'grad. norm':>12}{'validation':>12}{'weights':>12}")
    for case, difference in found.items():
        values: dict[str, Any] = vars(difference)
        print(f"{case.shown:24}" + "".join(f"{value:12.1e}" for value in values.values()))
    if options.output:
        rows = [{"case": case.shown, "settings": case.settings, **vars(each)} for case, each in found.items()]
        options.output.write_text(json.dumps({"steps": options.steps, "one": last, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
