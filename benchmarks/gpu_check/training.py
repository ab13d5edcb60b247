"""training: loss curves of a small model that must agree: devices, types, settings, strategies, resumed runs."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu_check import stand_ins
from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.resumed_run import RESULT, train_with_checkpoints
from benchmarks.gpu_check.small_model import (
    ON_CPU,
    SIZES,
    SMALL,
    TINY,
    Size,
    losses,
    make_folder,
    model_config,
    set_up,
    worst,
)
from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.distributed.process_group import init_single_process
from rm_gallery.modeling.attention.varlen import find_flash
from rm_gallery.modeling.parallel import master_weights
from rm_gallery.modeling.parallel.master_weights import MasterWeights
from rm_gallery.modeling.reward_model import RewardModel, load_reward_model
from rm_gallery.objectives import OBJECTIVES
from rm_gallery.objectives.metrics import Sums
from rm_gallery.training.trainer import Trainer

_ROOT = Path(__file__).resolve().parents[2]
FIRST_STEPS = 5
BOUNDS = {"fp32": (1e-4, 1e-3), "bf16": (0.02, 0.05)}
"""Largest difference of losses in the first steps, and in all steps."""


def run(report: Report) -> None:
    size = TINY if report.tiny else ON_CPU if report.device.type == "cpu" else SMALL
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with tempfile.TemporaryDirectory() as name:
        folder = make_folder(Path(name) / "model", size)
        _Part(report, folder, size).run()


class _Part:
    def __init__(self, report: Report, folder: Path, size: Size) -> None:
        self.report, self.folder, self.size = report, folder, size
        self.on_gpu = report.device.type == "cuda"
        self.plain: dict[str, list[float]] = {}
        """dtype -> losses on the device under default settings."""

    def run(self) -> None:
        for dtype in ("fp32", "bf16"):
            with self.report.check(f"curve {dtype}"):
                self.plain[dtype] = self.losses(dtype)
        if len(self.plain) == 2:
            self.compare_devices()
        for what, cases in self.settings().items():
            self.compare_setting(what, cases)
        with self.report.check("no synchronization"):
            self.check_synchronization()
        if not self.report.tiny:
            with self.report.check("kill and resume"):
                self.check_resume()
            with self.report.check("command line"):
                self.check_command_line()
            torch._dynamo.reset()
            self.compare_setting("compile", {"each layer": ({"compile": True}, {})})  # last, since it takes longest

    def losses(self, dtype: str, *, device: torch.device | None = None, **options: Any) -> list[float]:
        settings = options.pop("settings", {})
        return losses(self.folder, self.size, device or self.report.device, model_config(dtype, **settings), **options)

    def compare_devices(self) -> None:
        with self.report.check("GPU = CPU fp32"):
            settings = {} if self.on_gpu else {"attention": "sdpa"}
            other = self.losses("fp32", device=torch.device("cpu"), settings=settings)
            self.add("GPU = CPU fp32" if self.on_gpu else "sdpa = auto fp32", "fp32", self.plain["fp32"], other)
        self.add("bf16 = fp32", "bf16", self.plain["bf16"], self.plain["fp32"])
        first, last = self.plain["fp32"][0], self.plain["fp32"][-1]
        self.report.add("loss, first and last", None, f"{first:.4f} {last:.4f}", curve=self.plain)

    def settings(self) -> dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]]:
        """row -> case -> (settings of the model, options of the run)."""
        full = {"enable_gradient_checkpointing": True}
        selective = {**full, "checkpointing_mode": "selective"}
        found: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
            "checkpointing": {"full": (full, {}), "selective": (selective, {})},
            "no pinned prefetch": {"copied at once": ({}, {"prefetch": False})},
            "ddp, fsdp2, one rank": {"ddp": ({}, {"strategy": "ddp"}), "fsdp2": ({}, {"strategy": "fsdp2"})},
            "offload": {
                "optimizer": ({"optimizer_offload": True}, {}),
                "fsdp2": ({"cpu_offload": True}, {"strategy": "fsdp2"}),
            },
        }
        if self.on_gpu:
            found["attention kernels"] = {name: ({"attention": name}, {}) for name in ("varlen", "flex", "sdpa")}
            found["Liger"] = {"alone": ({"use_liger": True}, {}), "selective": ({"use_liger": True, **selective}, {})}
        return found

    def compare_setting(self, what: str, cases: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> None:
        """A row: the curves of all cases in both types, against those under default settings."""
        if what == "Liger" and importlib.util.find_spec("liger_kernel") is None:
            self.report.skip(what, "liger-kernel is not installed")
            return
        curves: dict[str, dict[str, list[float]]] = {dtype: {} for dtype in self.plain}
        for name, (settings, options) in cases.items():
            for dtype in self.plain:
                if name == "varlen" and (dtype == "fp32" or find_flash() is None):
                    continue  # it computes in bfloat16 only
                if what == "compile" and dtype == "bf16" and not self.on_gpu:
                    continue  # compiling takes a CPU a minute for each type
                with self.report.check(f"{what}: {name} {dtype}"), _group(options.get("strategy")):
                    curves[dtype][name] = self.losses(dtype, settings=settings, **options)
        self.add_all(what, curves)

    def add(self, what: str, dtype: str, found: list[float], expected: list[float]) -> None:
        first, later = worst(found[:FIRST_STEPS], expected[:FIRST_STEPS]), worst(found, expected)
        bounds = BOUNDS[dtype]
        self.report.add(
            what, first <= bounds[0] and later <= bounds[1], f"{dtype} {first:.1g}, {later:.1g}",
            f"{bounds[0]:g} {bounds[1]:g}", found=found, expected=expected,
        )  # fmt: skip

    def add_all(self, what: str, curves: dict[str, dict[str, list[float]]]) -> None:
        """One row for both types: the largest difference of all steps in each."""
        far, figures = [], []
        for dtype, cases in curves.items():
            first, later = BOUNDS[dtype]
            worsts = {name: worst(found, self.plain[dtype]) for name, found in cases.items()}
            for name, found in cases.items():
                if not (worst(found[:FIRST_STEPS], self.plain[dtype][:FIRST_STEPS]) <= first and worsts[name] <= later):
                    far.append(f"{name} {dtype}")
            if worsts:
                figures.append(f"{dtype} {max(worsts.values()):.1g}")
        if figures:
            bound = " ".join(f"{BOUNDS[dtype][1]:g}" for dtype, cases in curves.items() if cases)
            self.report.add(what, not far, ", ".join([*figures, *far]), bound, curves=curves)

    def check_synchronization(self) -> None:
        """On a GPU the sync debug mode raises where a micro-batch waits; on the meta device a needed value raises."""
        if not self.on_gpu:
            meta = torch.device("meta")
            model = load_reward_model(str(self.folder)).model.to(meta).train()
            weights = MasterWeights(model, torch.bfloat16)
            step = next(set_up(self.folder, self.size, torch.device("cpu"), model_config("fp32")).trainer.steps)
            one_micro_batch(model, weights, step.batches[0].to(meta), Sums())
            self.report.add("no value needed (meta)", True, "a micro-batch")
            return
        counts = {}
        for dtype in self.plain:
            with syncs_forbidden(after=2) as watched:
                self.losses(dtype)
            counts[dtype] = len(watched)
        steps = self.size.steps - 2
        figure = ", ".join(f"{dtype} {count} steps" for dtype, count in counts.items())
        self.report.add("no synchronization", set(counts.values()) == {steps}, figure, f"{steps}")

    def check_resume(self) -> None:
        """Runs that are killed after a checkpoint and resumed by other processes, against uninterrupted ones."""
        size_name = next(name for name, size in SIZES.items() if size == self.size)
        parent, device = self.folder.parent, self.report.device
        run_dirs = {dtype: parent / f"run-{dtype}" for dtype in self.plain}
        whole, again = (
            {
                dtype: train_with_checkpoints(self.folder, self.size, device, dtype, parent / f"{name}-{dtype}")
                for dtype in self.plain
            }
            for name in ("whole", "again")
        )
        for kill_at in (self.size.steps * 2 // 3, 0):
            arguments = [str(self.folder), size_name, str(device), str(kill_at)]
            command = [sys.executable, "-m", "benchmarks.gpu_check.resumed_run", *arguments]
            _run_all(
                [[*command, dtype, str(run_dirs[dtype])] for dtype in self.plain], -signal.SIGKILL if kill_at else 0
            )
        resumed = {dtype: json.loads((run_dirs[dtype] / RESULT).read_text()) for dtype in self.plain}
        for what, found in (("kill and resume", resumed), ("same run twice", again)):
            texts = {dtype: "equal" if found[dtype] == whole[dtype] else "differs" for dtype in self.plain}
            figure = ", ".join(f"{dtype} {text}" for dtype, text in texts.items())
            self.report.add(what, set(texts.values()) == {"equal"}, figure, "bit", found=found, expected=whole)

    def check_command_line(self) -> None:
        """`rm-gallery train` and `rm-gallery score` on a few pairs, if the packages that they need are here."""
        needed = ("hydra", "omegaconf", "pydantic", "annotated_types", "pyarrow", "rich", "yaml")
        if missing := [name for name in needed if importlib.util.find_spec(name) is None or name in stand_ins]:
            self.report.skip("command line", "not installed: " + ", ".join(missing))
            return
        parent, device = self.folder.parent, self.report.device.type
        rows = [{"chosen": f"{number} good", "rejected": f"{number} bad"} for number in range(12)]
        (parent / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [sys.executable, "-m", "rm_gallery.cli"]
        _run_all([[
            *command, "train", f"model.partial_pretrain={self.folder}", f"data.train_files={parent / 'pairs.jsonl'}",
            "data.train_batch_size=4", "data.max_length=64", f"trainer.device={device}",
            f"trainer.default_local_dir={parent}", "trainer.experiment_name=cli", f"data.cache_dir={parent / 'cache'}",
        ]], 0)  # fmt: skip
        checkpoint = parent / "cli" / "global_step_3"
        output = parent / "scored.jsonl"
        _run_all([[*command, "score", "--model", str(checkpoint), "--device", device, str(parent / "pairs.jsonl"),
                   "--output", str(output)]], 0)  # fmt: skip
        count = len(output.read_text().splitlines())
        self.report.add("command line", count == len(rows), f"train, score {count} rows", str(len(rows)))


def _run_all(commands: Sequence[Sequence[str]], status: int) -> None:
    """Run processes side by side; raise RuntimeError if one ends with another exit status."""
    children = [
        subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        for each in children:
            _, errors = each.communicate(timeout=300)
            if each.returncode != status:
                raise RuntimeError(f"exit status {each.returncode}: {errors[-500:]}")
    finally:
        for each in children:
            each.kill()


def one_micro_batch(model: RewardModel, weights: MasterWeights, batch: PackedBatch, sums: Sums) -> None:
    loss, metric_sums = OBJECTIVES["bradley_terry"](model(batch), batch)
    weights.backward(loss / 7, is_last=True)
    sums.add(metric_sums)


@contextmanager
def syncs_forbidden(*, after: int) -> Iterator[list[int]]:
    """Nothing between the first micro-batch of a step and the sum of gradients may wait for the GPU.

    after: steps that may, since kernels are loaded. Yields a list that grows by one with each step that is watched.
    """
    steps, watched = 0, []
    train_step, gather = Trainer.train_step, MasterWeights.gather_gradients

    def strict(self: Trainer, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > after:
            torch.cuda.set_sync_debug_mode("error")
            watched.append(steps)
        return train_step(self, *arguments)

    def lenient(self: MasterWeights, *arguments: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        return gather(self, *arguments)

    Trainer.train_step, MasterWeights.gather_gradients = strict, lenient
    try:
        yield watched
    finally:
        Trainer.train_step, MasterWeights.gather_gradients = train_step, gather
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def _group(strategy: str | None) -> Iterator[None]:
    """A process group of one rank over NCCL, or gloo on a CPU; DDP sums gradients as if there were another rank."""
    if strategy is None:
        yield
        return
    init_single_process()
    count = master_weights.world_size
    if strategy == "ddp":
        master_weights.world_size = lambda: 2
    try:
        yield
    finally:
        master_weights.world_size = count
        dist.destroy_process_group()
