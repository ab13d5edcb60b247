"""throughput: training and best-of-16 scoring of Qwen2.5 shapes, per kernel and setting, against padding and TRL.

A step is 64 pairs; ours packs 16,384 tokens a micro-batch. Chats have log-normal lengths: prompts around 200 tokens,
responses around 300 (95% below 900 and 1,000), at most 4,096 in all. `padded` is the library's model with its fused
attention in bf16 autocast over micro-batches of 8 pairs that are padded to their longest, which is what TRL's trainer
computes; `trl` is that trainer. All have gradient checkpointing where the shape needs it. A shape that does not fit
(float32 weights, gradients and AdamW's moments: 18 bytes a parameter) has as many of its layers as do. MFU is FLOPs on
unique tokens (forward and backward, no checkpointing, the last layer only where needed) over the rate of bfloat16
products measured in the same run.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_check.facts import matrix_rate
from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.systems import (
    BUDGET,
    SHAPES,
    STEP_PAIRS,
    make_groups,
    make_packs,
    num_layers_that_fit,
    ours,
    packed_scoring,
    padded,
    padded_scoring,
    seconds_of_trl,
    shape_config,
)
from benchmarks.matrix_rate import operations

MFU_GOAL, TRL_GOAL = 0.5, 2.5
OURS: dict[str, dict[str, Any]] = {
    "auto": {}, "compile": {"compile": True}, "liger": {"use_liger": True}, "varlen": {"attention": "varlen"},
    "flex": {"attention": "flex"}, "sdpa": {"attention": "sdpa"},
}  # fmt: skip
"""Settings of our systems by name."""
_ON_GPU = (
    ("1.5b", "auto"), ("7b", "auto"), ("0.5b", "auto"), ("1.5b", "best of 16"), ("1.5b", "trl"), ("1.5b", "padded"),
    ("1.5b", "compile"), ("1.5b", "liger"), ("1.5b", "flex"), ("1.5b", "sdpa"), ("7b", "trl"), ("7b", "compile"),
    ("7b", "padded"), ("7b", "best of 16"), ("7b", "liger"), ("7b", "flex"), ("7b", "sdpa"), ("0.5b", "trl"),
    ("0.5b", "compile"), ("0.5b", "padded"), ("0.5b", "best of 16"), ("0.5b", "liger"), ("0.5b", "flex"),
    ("0.5b", "sdpa"),
)  # fmt: skip
"""(shape, system), the most important ones first; those for which no time is left are named."""
_PACKAGES = {"liger": "liger_kernel", "trl": "trl"}
_ON_CPU = (("tiny", "auto"), ("tiny", "padded"), ("tiny", "sdpa"), ("tiny", "best of 16"))


@dataclass
class Timed:
    """One system on one shape."""

    shape: str
    system: str
    layers: int
    seconds: float
    """Median of a step, or of one pass of best-of-16 scoring."""
    pairs_per_second: float
    tokens_per_second: float
    mfu: float
    peak_bytes: int
    checkpointing: bool


def run(report: Report) -> None:
    on_gpu = report.device.type == "cuda"
    rate = next((each.details["flops"] for each in report.earlier if "flops" in each.details), None)
    rate = rate or matrix_rate(report.device, report.seconds(1.0))
    found: dict[str, dict[str, Timed]] = {}
    missing = [name for name, package in _PACKAGES.items() if importlib.util.find_spec(package) is None]
    late: list[str] = []
    for shape, system in _ON_GPU if on_gpu else _ON_CPU:
        if system in missing:
            continue
        if not report.has_time(25.0 if on_gpu else 0.0) and system != "auto":
            late.append(f"{shape} {system}")
            continue
        with report.check(f"{shape} {system}"):
            if system == "best of 16":
                _add_scoring(report, shape, rate)
                continue
            timed = measure(report, shape, system, rate)
            found.setdefault(shape, {})[system] = timed
            if system == "auto":
                _add_auto(report, timed)
    for shape, systems in found.items():
        if "auto" in systems:
            _add_ratios(report, shape, systems)
    if missing:
        report.skip("baselines, settings", "not installed: " + ", ".join(missing))
    if late:
        report.skip("no time left", ", ".join(late))


def num_pairs(report: Report) -> int:
    """Pairs of a step."""
    return STEP_PAIRS if report.device.type == "cuda" else 4 if report.tiny else 16


def measure(report: Report, shape: str, system: str, rate: float, *, profiled: bool = True) -> Timed:
    """Time the steps of a system."""
    device, layers = report.device, num_layers_that_fit(shape, report.device)
    scale = 1.0 if device.type == "cuda" else 0.1
    groups = make_groups(num_pairs(report), SHAPES[shape][-1], scale)
    checkpointing = shape == "7b"
    _free(device)
    config = shape_config(shape, layers)
    packs = make_packs(groups, int(BUDGET * scale), config.hidden_size)
    if system == "trl":
        seconds = seconds_of_trl(config, groups, device, checkpointing=checkpointing, repeats=3)
    else:
        if system == "padded":
            step = padded(config, groups, device, checkpointing=checkpointing)
        else:
            more: dict[str, Any] = {"enable_gradient_checkpointing": True} if checkpointing else {}
            step = ours(config, packs, device, **OURS[system], **more)
        seconds = _times(report, step)
        if profiled and system == "auto" and shape in ("1.5b", "tiny"):
            with report.check(f"{shape} profile"):
                _profile(report, shape, step)
    middle = statistics.median(seconds)
    work = sum(operations(config, pack.group_lengths, pack.tail_lengths) for pack in packs)
    return Timed(
        shape, system, layers, middle, len(groups) / middle, sum(pack.num_tokens for pack in packs) / middle,
        work / middle / rate, torch.cuda.max_memory_allocated() if device.type == "cuda" else 0, checkpointing,
    )  # fmt: skip


def _free(device: torch.device) -> None:
    torch._dynamo.reset()
    gc.collect()  # here, where no exception holds the frames of a system that failed
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _times(report: Report, step: Callable[[], Any]) -> list[float]:
    """Seconds of at least three steps, after one that warms up."""
    times: list[float] = []
    end = time.monotonic() + report.seconds(4.0)
    for number in range(100):
        report.wait()
        start = time.perf_counter()
        step()
        report.wait()
        if number or report.tiny:
            times.append(time.perf_counter() - start)
        if len(times) >= (1 if report.tiny else 3) and time.monotonic() > end:
            break
    return times


def _add_auto(report: Report, timed: Timed) -> None:
    whole = timed.layers == SHAPES[timed.shape][0]
    name = f"{timed.shape} auto" if whole else f"{timed.shape} auto, {timed.layers} layers"
    figure = f"{timed.pairs_per_second:.3g}/s"
    if timed.peak_bytes:  # on a GPU; a CPU's rate of bfloat16 products says little about it
        figure += f", MFU {timed.mfu:.0%}, {timed.peak_bytes / 2**30:.1f} GiB"
    is_goal = timed.shape in ("1.5b", "7b")
    bound = f"{MFU_GOAL:.0%}" if is_goal else ""
    report.add(name, timed.mfu >= MFU_GOAL if is_goal else None, figure, bound, goal=True, **vars(timed))


def _add_ratios(report: Report, shape: str, systems: dict[str, Timed]) -> None:
    """A row for the baselines: ours over theirs; and one for kernels and settings: theirs over auto."""
    auto = systems["auto"].pairs_per_second
    details = {name: vars(timed) for name, timed in systems.items()}
    over = {name: auto / systems[name].pairs_per_second for name in ("padded", "trl") if name in systems}
    if over:
        ok = over["trl"] >= TRL_GOAL if "trl" in over else None
        figure = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in over.items())
        report.add(
            f"{shape} baselines", ok, figure, f"{TRL_GOAL}x trl" if "trl" in over else "", goal=True, all=details
        )
    ratios = {name: timed.pairs_per_second / auto for name, timed in systems.items() if name in OURS and name != "auto"}
    if ratios:
        figure = " ".join(f"{name} {ratio:.2f}".replace(" 0.", " .") for name, ratio in ratios.items())
        report.add(f"{shape} settings/auto", None, figure, all=details)


def _add_scoring(report: Report, shape: str, rate: float) -> None:
    """Responses a second of 16 prompts with 16 responses each, packed with the prompt once and padded."""
    device, layers = report.device, num_layers_that_fit(shape, report.device)
    scale = 1.0 if device.type == "cuda" else 0.1
    groups = make_groups(num_pairs(report) // 4, SHAPES[shape][-1], scale, num_responses=16)
    config = shape_config(shape, layers)
    packs = make_packs(groups, int(BUDGET * scale), config.hidden_size)
    per_second, rewards = {}, []
    for name, make in (("ours", packed_scoring), ("padded", padded_scoring)):
        _free(device)
        score = make(config, groups, packs, device)
        rewards.append(score())
        per_second[name] = 16 * len(groups) / statistics.median(_times(report, score))
    work = sum(operations(config, pack.group_lengths, pack.tail_lengths) for pack in packs) / 3
    mfu = work / (16 * len(groups)) * per_second["ours"] / rate
    ratio = per_second["ours"] / per_second["padded"]
    report.add(
        f"{shape} best of 16", None, f"{per_second['ours']:.3g}/s, {ratio:.2f}x padded",
        per_second=per_second, mfu=mfu, largest_difference=float((rewards[0] - rewards[1]).abs().max()),
    )  # fmt: skip


def _profile(report: Report, shape: str, step: Callable[[], Any]) -> None:
    """The ten kernels (on a CPU: operations) that take most of a step, and the share of time without a kernel."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = report.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as found:
        step()
        report.wait()
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    averages = [each for each in found.key_averages() if each.device_type == kind and not each.is_user_annotation]
    rows = sorted(averages, key=lambda each: -getattr(each, order))
    total = sum(getattr(each, order) for each in rows) or 1.0
    top = [(each.key, getattr(each, order) / total) for each in rows[:10]]
    idle = ""
    if on_gpu:
        kernels = [each for each in found.events() if each.device_type == kind and not each.is_user_annotation]
        spans = sorted((each.time_range.start, each.time_range.end) for each in kernels)
        idle = f", idle {idle_share(spans):.0%}" if spans else ", no kernel seen"
    name, share = top[0]
    report.add(f"{shape} profile", None, f"{share:.0%} {name[:14]}{idle}", top=top)


def idle_share(spans: list[tuple[float, float]]) -> float:
    """Share of the time from the first start to the last end in which no span runs; spans are sorted by their start."""
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / ((reached - spans[0][0]) or 1.0)
