"""Kill a run again and again, at random, and compare the result with an uninterrupted run.

    python -m benchmarks.faults [--kills 50] [--steps 400] [--save-freq 5] [--processes 2] [--strategy fsdp2]
                                [--seed 0] [--background] [--output FILE.json]

`torchrun --max-restarts` trains a tiny Qwen2 model on made-up pairs (CPU, gloo). Once the processes train, one of them,
drawn at random, is ended with SIGKILL: after a random time within its steps, or while a checkpoint is being written.
torchrun starts all again, and they resume from the newest checkpoint. In the end the metrics (times and rates apart)
and the weights must be those of the undisturbed run bit for bit, every step must be there once, and a step that was
run again must have given the same figures each time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[1]
_RATES = ("time", "perf/pairs_per_second", "perf/tokens_per_second", "perf/step_seconds")
_PATIENCE = 300.0  # seconds in which processes that were started must train


@dataclass(frozen=True)
class Course:
    """What is trained, and how often it is killed."""

    kills: int = 50
    steps: int = 400
    save_freq: int = 5
    processes: int = 2
    strategy: str = "fsdp2"
    background: bool = False
    seed: int = 0


@dataclass
class Outcome:
    """What happened, and whether it made a difference."""

    kills: dict[str, int] = field(default_factory=dict)
    """Of each rank, in steps and in saves."""
    starts: int = 1
    rows_again: int = 0
    """Rows of steps and validations that an earlier start had logged, and lost."""
    differing_rows: list[str] = field(default_factory=list)
    """Rows that a later start logged otherwise."""
    same_metrics: bool = False
    same_weights: bool = False
    steps_once: bool = False
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        return self.same_metrics and self.same_weights and self.steps_once and not self.differing_rows


class Launcher(Protocol):
    """A torchrun that was started, as subprocess.Popen."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def wait(self) -> int: ...
    def terminate(self) -> None: ...


def make_inputs(folder: Path) -> None:
    from tests.small import make_model, text_pairs, write_pairs

    make_model("qwen2", folder / "model")
    write_pairs(folder / "train.parquet", text_pairs(64))
    write_pairs(folder / "val.parquet", text_pairs(12, seed=1))


def arguments(folder: Path, name: str, course: Course) -> list[str]:
    """Of torchrun, for the run NAME in the folder."""
    options = ["--standalone", "--monitor-interval=0.1", f"--nproc_per_node={course.processes}",
               f"--max_restarts={course.kills + 5}"]  # fmt: skip
    settings = {
        "model.partial_pretrain": folder / "model",
        "model.strategy": course.strategy,
        "model.dropout": 0.1,
        "model.fsdp_config.model_dtype": "fp32",
        "data.train_files": folder / "train.parquet",
        "data.val_files": folder / "val.parquet",
        "data.max_length": 128,
        "data.train_batch_size": 8,
        "data.max_tokens_per_micro_batch": 300,
        "optim.lr": 1e-3,
        "trainer.total_training_steps": course.steps,
        "trainer.save_freq": course.save_freq,
        "trainer.test_freq": 10 * course.save_freq,
        "trainer.max_ckpt_to_keep": 3,
        "trainer.async_save": course.background,
        "trainer.default_local_dir": folder,
        "trainer.experiment_name": name,
        "trainer.logger": "[]",
        "trainer.device": "cpu",
    }
    script = ROOT / "tutorials/cookbooks/training_reward_model/bradley_terry/trainer.py"
    return [*options, str(script), *(f"{key}={value}" for key, value in settings.items())]


def torchrun(arguments: list[str], log: Path) -> Launcher:
    """Start it; what it says goes to the log."""
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def rows(run: Path) -> list[dict[str, Any]]:
    """Whole rows of metrics.jsonl; none when there is no such file yet."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """A row without times and rates."""
    return {name: value for name, value in row.items() if name not in _RATES}


def workers(launcher: int) -> list[int]:
    """Process numbers by rank of the processes that a torchrun has now. It starts rank after rank, and nothing else."""
    found: list[int] = []
    for task in Path(f"/proc/{launcher}/task").iterdir():
        found += map(int, (task / "children").read_text().split())  # in the order in which they were started
    return found


def disturb(process: Launcher, run: Path, course: Course, outcome: Outcome) -> None:
    """Kill workers until there were as many kills as asked for. Raises RuntimeError when the run ends before."""
    draw = random.Random(course.seed)
    seen: dict[tuple[int, bool], dict[str, Any]] = {}
    when = 0.0
    for number in range(course.kills):
        rank = draw.randrange(course.processes)
        _wait(process, lambda when=when: any(row["time"] > when for row in rows(run)[-1:]))  # type: ignore[misc]
        alive = workers(process.pid)
        assert len(alive) == course.processes, f"{len(alive)} children of torchrun, not {course.processes}"
        if number % 2:  # in turns
            _wait(process, lambda: any(run.glob(".global_step_*.saving")))
            time.sleep(draw.uniform(0.0, 0.15))
        else:
            time.sleep(draw.uniform(0.0, 1.0))
        is_saving = any(run.glob(".global_step_*.saving"))
        os.kill(alive[rank], signal.SIGKILL)
        where = f"rank {rank}, {'during a save' if is_saving else 'during steps'}"
        outcome.kills[where] = outcome.kills.get(where, 0) + 1
        outcome.starts += 1
        _gone(alive)
        when = time.time()
        note(rows(run), seen, outcome)
    process.wait()
    note(rows(run), seen, outcome)


def note(found: list[dict[str, Any]], seen: dict[tuple[int, bool], dict[str, Any]], outcome: Outcome) -> None:
    """Compare rows with what earlier starts logged for the same steps."""
    for row in found:
        key = (row["step"], "val/loss" in row)
        before = seen.get(key)
        if before is not None and before["time"] != row["time"]:
            outcome.rows_again += 1
            if figures(before) != figures(row):
                outcome.differing_rows.append(f"step {row['step']}: {figures(row)} after {figures(before)}")
        seen[key] = row


def _wait(process: Launcher, ask: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + _PATIENCE
    while not (answer := ask()):
        if process.poll() is not None:
            raise RuntimeError("the run ended before all kills were made; raise --steps")
        if time.monotonic() > deadline:
            raise RuntimeError(f"no process trained within {_PATIENCE:g} s")
        time.sleep(0.005)
    return answer


def _gone(processes: Iterable[int]) -> None:
    """Wait until these processes ended, so that nothing more of theirs is written."""
    deadline = time.monotonic() + 60
    while any(_runs(pid) for pid in processes):
        if time.monotonic() > deadline:
            raise RuntimeError("the other processes outlived a killed one by a minute")
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def run_course(folder: Path, course: Course, start: Callable[[list[str], Path], Launcher] = torchrun) -> Outcome:
    """Train once undisturbed and once with kills; what differs. Raises RuntimeError with the log of a failed run.

    start: starts a torchrun with these arguments, and its log.
    """
    make_inputs(folder)
    outcome = Outcome()
    before = time.monotonic()
    for name in ("whole", "killed"):
        process = start(arguments(folder, name, course), folder / f"{name}.log")
        try:
            if name == "killed":
                disturb(process, folder / name, course, outcome)
            elif process.wait():
                raise RuntimeError("the undisturbed run failed")
            if process.returncode:
                raise RuntimeError(f"the {name} run ended with status {process.returncode}")
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{(folder / f'{name}.log').read_text(errors='replace')[-6000:]}") from error
        finally:
            process.terminate()
            process.wait()
    outcome.seconds = time.monotonic() - before
    whole, killed = ([figures(row) for row in rows(folder / name)] for name in ("whole", "killed"))
    outcome.same_metrics = whole == killed
    outcome.steps_once = [row["step"] for row in killed if "train/loss" in row] == list(range(1, course.steps + 1))
    outcome.same_weights = _same_files(folder, f"global_step_{course.steps}/model.safetensors")
    return outcome


def _same_files(folder: Path, name: str) -> bool:
    return (folder / "whole" / name).read_bytes() == (folder / "killed" / name).read_bytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Course()).items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(option, type=type(value), default=value)
    parser.add_argument("--output", type=Path)
    options = vars(parser.parse_args())
    output = options.pop("output")
    course = Course(**options)
    with tempfile.TemporaryDirectory() as name:
        outcome = run_course(Path(name), course)
    print(f"{sum(outcome.kills.values())} kills in {course.steps} steps of {course.processes} x {course.strategy}, "
          f"{outcome.starts} starts, {outcome.seconds:.0f} s")  # fmt: skip
    for where, count in sorted(outcome.kills.items()):
        print(f"  {where:24}{count:4}")
    print(f"rows logged again         {outcome.rows_again}, with other figures {len(outcome.differing_rows)}")
    print(f"every step exactly once   {outcome.steps_once}")
    print(f"same metrics              {outcome.same_metrics}")
    print(f"same weights, bit by bit  {outcome.same_weights}")
    for line in outcome.differing_rows[:5]:
        print(line)
    if output:
        output.write_text(json.dumps({**asdict(course), **asdict(outcome)}, indent=2) + "\n")
    return 0 if outcome.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
