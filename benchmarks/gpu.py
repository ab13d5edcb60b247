"""Training speed on one GPU: ours by kernel, against padding as other trainers do, for Qwen2.5 shapes.

    python -m benchmarks.gpu [--shapes 0.5b 1.5b 7b] [--systems PART ...] [--seconds 420] [--output FILE.json]
    python -m benchmarks.gpu --device cpu --shapes tiny        # the same code without a GPU

Packages: torch >= 2.11, transformers >= 5.17, numpy, annotated-types, safetensors; triton for FlexAttention, flash-attn
or a torch with variable-length attention for `varlen`, liger-kernel for `liger`, trl and datasets for `trl`: cases
of missing packages are skipped with a message. Needs no network and no files: weights and texts are random.

Chats have log-normal lengths: prompts around 200 tokens, responses around 300 (95% below 900 and 1,000), at most 4,096
in all. A step is 64 pairs; ours packs 16,384 tokens a micro-batch. `padded` is the library's model with its fused
attention in bf16 autocast over micro-batches of 8 pairs that are padded to their longest, which is what TRL's trainer
computes; `trl` is that trainer. All have gradient checkpointing where the shape needs it. A shape that does not fit
whole (float32 weights, gradients and AdamW's moments, 18 bytes a parameter) has as many of its layers as do; the table
says how many.
MFU is operations on unique tokens (forward and backward, no checkpointing, the last layer only where needed) over the
rate of 8,192-wide bfloat16 products measured in the same run. `estimate` is the peak memory that `rm-gallery estimate`
computes for the same micro-batches, as a difference from the measured peak. Best-of-16 scores 64 prompts with 16
responses each, without gradients: ours packed with the prompt once, and padded batches of 16 texts.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_systems import (
    BUDGET,
    SHAPES,
    STEP_PAIRS,
    estimated_peak,
    make_groups,
    make_packs,
    num_layers_that_fit,
    ours,
    packed_scoring,
    padded,
    padded_scoring,
    seconds_of_trl,
    shape_config,
    wait,
)
from benchmarks.matrix_rate import operations


@dataclass
class Result:
    """One system on one shape."""

    shape: str
    system: str
    pairs_per_second: list[float]
    tokens_per_second: float
    mfu: float | None
    peak_gib: float
    problem: str = ""
    estimated_gib: float | None = None


def matrix_rate(device: torch.device, seconds: float = 1.0) -> float:
    """Operations a second of large bfloat16 products."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    wait(device)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(10):
            a @ b
        wait(device)
        count += 10
    return 2 * size**3 * count / (time.perf_counter() - start)


def time_step(step: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    step()
    wait(device)
    return time.perf_counter() - start


def profile(step: Callable[[], None], device: torch.device) -> str:
    """The kernels that take most of a step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch_profile(activities=kinds) as found:
        step()
        wait(device)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return str(found.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=60))


def systems(options: argparse.Namespace, checkpointing: bool) -> dict[str, dict[str, Any] | None]:
    """Settings of ours by name; None for the others."""
    more = {"enable_gradient_checkpointing": True} if checkpointing else {}
    found: dict[str, dict[str, Any] | None] = {
        f"ours, {name}": {"attention": name, **more} for name in ("varlen", "flex", "sdpa")
    }
    if options.device == "cpu":
        found = {"ours, auto": more}
    else:
        found["ours, liger"] = {"use_liger": True, **more}
        found["ours, compile"] = {"compile": True, **more}
    every = {**found, "padded": None, "trl": None}
    return {name: settings for name, settings in every.items() if _is_wanted(name, options.systems)}


def _is_wanted(name: str, parts: list[str] | None) -> bool:
    return parts is None or any(part in name for part in parts)


def measure_shape(shape: str, options: argparse.Namespace, rate: float, deadline: float) -> list[Result]:
    import tempfile

    device = torch.device(options.device)
    layers = num_layers_that_fit(shape, device)
    scale = 1.0 if device.type == "cuda" else 0.1
    groups = make_groups(STEP_PAIRS, SHAPES[shape][-1], scale)
    checkpointing = shape == "7b"
    name_of_shape = shape if layers == SHAPES[shape][0] else f"{shape}, {layers} layers"
    results = []
    step: Any = None
    for name, settings in systems(options, checkpointing).items():
        if time.monotonic() > deadline:
            results.append(Result(name_of_shape, name, [], 0.0, None, 0.0, "no time left (--seconds)"))
            continue
        gc.collect()  # here, where no exception holds the frames of a system that failed
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            with tempfile.TemporaryDirectory() as folder:
                config = shape_config(shape, layers, Path(folder))
                packs = make_packs(groups, int(BUDGET * scale), config.hidden_size)
                if name == "trl":
                    options_of_trl = {"checkpointing": checkpointing, "repeats": options.repeats}
                    seconds = seconds_of_trl(config, groups, device, **options_of_trl)
                elif settings is None:
                    step = padded(config, groups, device, checkpointing=checkpointing)
                else:
                    step = ours(config, Path(folder), packs, device, **settings)
            if name != "trl":
                seconds = [time_step(step, device) for _ in range(options.repeats + 2)][2:]
        except Exception as error:  # a kernel that is not there, or too little memory: the others are still measured
            text = " ".join(str(error).split())[:90] or type(error).__name__
            results.append(Result(name_of_shape, name, [], 0.0, None, 0.0, text))
            step = None
            continue
        work = sum(operations(config, pack.group_lengths, pack.tail_lengths) for pack in packs)
        tokens = sum(pack.num_tokens for pack in packs)
        middle = statistics.median(seconds)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        rates = [len(groups) / each for each in seconds]
        estimated = None
        if name.startswith("ours"):
            with tempfile.TemporaryDirectory() as folder:
                shape_config(shape, layers, Path(folder))
                (Path(folder) / "model.safetensors").touch()
                estimated = estimated_peak(Path(folder), packs, checkpointing=checkpointing) / 2**30
        results.append(
            Result(name_of_shape, name, rates, tokens / middle, work / middle / rate, peak, estimated_gib=estimated)
        )
        print(f"{name_of_shape}: {name}: {middle:.3f} s a step", flush=True)
        if options.profile == shape and settings is not None and name == next(iter(systems(options, checkpointing))):
            print(profile(step, device), flush=True)
        step = None
        gc.collect()
    return results


def measure_scoring(shape: str, options: argparse.Namespace, rate: float) -> list[Result]:
    """Responses a second of best-of-16 scoring, packed and padded, and how far their rewards differ."""
    import tempfile

    device = torch.device(options.device)
    layers = num_layers_that_fit(shape, device)
    scale = 1.0 if device.type == "cuda" else 0.1
    groups = make_groups(64, SHAPES[shape][-1], scale, num_responses=16)
    results, rewards = [], []
    name_of_shape = shape if layers == SHAPES[shape][0] else f"{shape}, {layers} layers"
    for name, make in (("best of 16, ours", packed_scoring), ("best of 16, padded", padded_scoring)):
        with tempfile.TemporaryDirectory() as folder:
            config = shape_config(shape, layers, Path(folder))
            packs = make_packs(groups, int(BUDGET * scale), config.hidden_size)
            score = make(config, Path(folder), groups, packs, device)
        rewards.append(score())
        seconds = [time_step(score, device) for _ in range(options.repeats)]
        middle = statistics.median(seconds)
        work = sum(operations(config, pack.group_lengths, pack.tail_lengths) for pack in packs) / 3
        tokens = sum(pack.num_tokens for pack in packs)
        rates = [16 * len(groups) / each for each in seconds]
        results.append(Result(name_of_shape, name, rates, tokens / middle, work / middle / rate, 0.0))
        gc.collect()
    worst = float((rewards[0] - rewards[-1]).abs().max())
    print(f"{name_of_shape}: best of 16: rewards packed and padded differ by at most {worst:.3g}", flush=True)
    return results


def padded_of(system: str) -> str:
    return "best of 16, padded" if system.startswith("best of 16") else "padded"


def show(results: list[Result], rate: float, options: argparse.Namespace) -> None:
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    tflops = f"{rate / 1e12:.4g} TFLOP/s in bfloat16 products"
    print(f"\n{device}, torch {torch.__version__}, {tflops}; {STEP_PAIRS} pairs a step")
    columns = ("tokens/s", 10), ("MFU", 7), ("peak GiB", 10), ("/ padded", 10), ("estimate", 10)
    head = "".join(f"{name:>{width}}" for name, width in columns)
    print(f"{'shape':18}{'system':22}{'pairs/s: median (range)':30}{head}")
    for each in results:
        if each.problem:
            print(f"{each.shape:18}{each.system:22}{each.problem}")
            continue
        base = [
            other
            for other in results
            if other.shape == each.shape and other.system == padded_of(each.system) and not other.problem
        ]
        middle = statistics.median(each.pairs_per_second)
        ratio = f"{middle / statistics.median(base[0].pairs_per_second):.2f}" if base else ""
        off = f"{each.estimated_gib / each.peak_gib - 1:+.1%}" if each.estimated_gib and each.peak_gib else ""
        spread = f"{middle:.2f} ({min(each.pairs_per_second):.2f} to {max(each.pairs_per_second):.2f})"
        print(
            f"{each.shape:18}{each.system:22}{spread:30}{each.tokens_per_second:10,.0f}{each.mfu or 0:7.1%}"
            f"{each.peak_gib:10.2f}{ratio:>10}{off:>10}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shapes", nargs="+", default=["0.5b", "1.5b", "7b"], choices=SHAPES)
    parser.add_argument("--systems", nargs="+", help="only those whose name has one of these parts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=420.0, help="no system is begun after this")
    parser.add_argument("--profile", default="1.5b", help="shape of which the first system is profiled")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu --shapes tiny runs the same code")
    deadline = time.monotonic() + options.seconds
    rate = matrix_rate(torch.device(options.device))
    results: list[Result] = []
    for shape in options.shapes:
        results += measure_shape(shape, options, rate, deadline)
        if _is_wanted("best of 16", options.systems) and time.monotonic() < deadline:
            results += measure_scoring(shape, options, rate)
    show(results, rate, options)
    if options.output:
        options.output.write_text(
            json.dumps({"rate": rate, "results": [vars(each) for each in results]}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
