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
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # for `python benchmarks/strategies.py`

from tests import forks  # noqa: E402


@dataclass(frozen=True)
class Case:
    """A way to run: number of processes per node, number of nodes, and settings."""

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
    Case("fsdp2", 2, ("model.strategy=fsdp2",)),
    Case("fsdp2-offload", 2, ("model.strategy=fsdp2", "model.fsdp_config.cpu_offload=true")),
    Case("fsdp2-hybrid", 4, ("model.strategy=fsdp2", "model.fsdp_config.fsdp_size=2")),
    Case("fsdp2-nodes", 1, ("model.strategy=fsdp2",), nodes=2),
)


@dataclass(frozen=True)
class Difference:
    """Largest differences to the run of one process."""

    loss: float
    grad_norm: float
    validation: float
    """Of loss, accuracy and margin. Mean rewards are not compared: a constant added to all rewards changes no loss, so
    rounding alone moves it."""
    weights: float


def make_inputs(folder: Path) -> None:
    """A model folder, 40 pairs to train on and 11 to validate: counts that two and four do not divide evenly."""
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


def work(folder: Path, cases: list[Case], steps: int) -> int:
    """What each process does: one run after the other; its exit status."""
    from rm_gallery.cli import main as rm_gallery

    return next((status for case in cases if (status := rm_gallery(["train", *arguments(folder, case, steps)]))), 0)


def launch(folder: Path, cases: list[Case], steps: int) -> None:
    """Run cases of equal processes and nodes in one start of them. Raises RuntimeError with the log when one fails."""
    nodes, processes = cases[0].nodes, cases[0].processes
    log = folder / f"{cases[0].name}.log"
    if nodes > 1:
        own = ("--folder", str(folder), "--steps", str(steps), "--only", *(case.name for case in cases))
        meeting = (f"--nnodes={nodes}", "--master_addr=127.0.0.1", f"--master_port={forks.free_port()}")
        options = (*meeting, f"--nproc_per_node={processes}")
        started = [forks.torchrun(*options, f"--node_rank={node}", __file__, *own, log=log) for node in range(nodes)]
    elif cases == [ONE]:
        started = [forks.start(work, folder, cases, steps, log=log, variables={"OMP_NUM_THREADS": "1"})]
    else:
        started = forks.ranks(processes, work, folder, cases, steps, log=log)
    if any(forks.finish(started, 600)):
        raise RuntimeError(f"{', '.join(case.shown for case in cases)}: {log.read_text(errors='replace')[-4000:]}")


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
    options = parser.parse_args()
    chosen = tuple(case for case in (ONE, *CASES) if not options.only or case.name in options.only)
    if options.folder:
        sys.exit(work(options.folder, list(chosen), options.steps))
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
