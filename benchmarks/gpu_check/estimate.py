"""estimate: the memory and the time that `rm-gallery estimate` predicts for the steps that throughput measured."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from safetensors.numpy import save_file

from benchmarks.gpu_check.facts import matrix_rate
from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.systems import (
    BUDGET,
    SHAPES,
    estimated_peak,
    make_groups,
    make_packs,
    shape_config,
    sizes_of,
)
from benchmarks.gpu_check.throughput import Timed, measure, num_pairs
from rm_gallery.planning.config import EstimateConfig
from rm_gallery.planning.devices import GPUS
from rm_gallery.planning.estimate import flops_per_token
from rm_gallery.planning.model_shape import load_shape

BOUND = 0.15


def run(report: Report) -> None:
    steps = [
        Timed(**{name: each.details[name] for name in Timed.__dataclass_fields__})
        for each in report.earlier
        if each.details.get("system") == "auto"
    ]
    if not steps:
        rate = matrix_rate(report.device, report.seconds(1.0))
        for shape in ("1.5b", "0.5b", "7b") if report.device.type == "cuda" else ("tiny",):
            with report.check(f"{shape} auto"):
                steps.append(measure(report, shape, "auto", rate, profiled=False))
    for timed in steps:
        with report.check(timed.shape):
            _compare(report, timed)


def _compare(report: Report, timed: Timed) -> None:
    on_gpu = report.device.type == "cuda"
    scale = 1.0 if on_gpu else 0.1
    groups = make_groups(num_pairs(report), SHAPES[timed.shape][-1], scale)
    config = shape_config(timed.shape, timed.layers)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save_file({}, Path(folder) / "model.safetensors")  # a model folder without weights is refused
        shape = load_shape(folder, trust_remote_code=False)
    packs = make_packs(groups, int(BUDGET * scale), config.hidden_size)
    peak = estimated_peak(shape, packs, checkpointing=timed.checkpointing)
    tokens = sum(pack.num_tokens for pack in packs)
    flops = flops_per_token(shape, sizes_of(groups), checkpointing=timed.checkpointing) * tokens
    seconds = flops / (device_rate(report.device) or math.nan) / EstimateConfig().mfu
    details = {"memory": peak, "measured_memory": timed.peak_bytes, "time": seconds, "measured_time": timed.seconds}
    if not on_gpu:
        report.add(f"{timed.shape} memory", None, f"{peak / 2**20:.1f} MiB, not measured on a CPU", **details)
        return
    memory, time = peak / timed.peak_bytes - 1, seconds / timed.seconds - 1
    is_exact = abs(memory) <= BOUND
    figure = f"memory {memory:+.1%}" + ("" if math.isnan(time) else f", time {time:+.1%}")
    ok = is_exact and (math.isnan(time) or abs(time) <= BOUND)
    report.add(timed.shape, ok, figure, f"{BOUND:.0%}", goal=is_exact, **details)  # the time is a goal


def device_rate(device: torch.device) -> float | None:
    """Published bfloat16 FLOP/s of the GPU by its name; None if `rm-gallery estimate` does not know it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    for kind, each in GPUS.items():
        model, _, size = kind.partition("-")
        words = name.replace("-", " ").split()
        if model in words and (not size or abs(float(size) - memory) < 0.1 * memory):
            return each.bf16_flops
    return None
