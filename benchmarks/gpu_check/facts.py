"""facts: the device, versions, and the rates that other figures are relative to."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable

import torch

from benchmarks.gpu_check.report import Report

_NEEDED = ("torch", "transformers", "numpy", "safetensors", "tokenizers")
_OPTIONAL = ("triton", "flash-attn", "liger-kernel", "peft", "trl", "pyarrow", "pydantic", "hydra-core")


def run(report: Report) -> None:
    with report.check("device"):
        report.add("device", None, device_name(report.device), driver=_driver())
        versions = {name: _version(name) for name in (*_NEEDED, *_OPTIONAL)}
        versions["python"] = platform.python_version()
        report.add("torch, transformers", None, f"{versions['torch']}, {versions['transformers']}", **versions)
        missing = [name for name in _OPTIONAL if versions[name] is None]
        if missing:
            report.skip("packages", "not here: " + ", ".join(missing))
    with report.check("bf16 rate, bandwidth"):
        flops = matrix_rate(report.device, report.seconds(2.0))
        bandwidth = memory_bandwidth(report.device, report.seconds(2.0))
        figure = f"{flops / 1e12:.3g} TFLOP/s, {bandwidth / 1e9:,.4g} GB/s"
        report.add("bf16 rate, bandwidth", None, figure, flops=flops, bytes_per_second=bandwidth)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        return f"{torch.cuda.get_device_name(device)}, {memory:.1f} GiB"
    return f"CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"


def matrix_rate(device: torch.device, seconds: float) -> float:
    """FLOP/s of large bfloat16 products of random numbers."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 * _per_second(lambda: torch.mm(a, b), device, seconds)


def memory_bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes per second of a copy, read and written."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size * _per_second(lambda: target.copy_(source), device, seconds)


def _per_second(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    wait()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(10 if device.type == "cuda" else 1):
            call()
            count += 1
        wait()
    return count / (time.perf_counter() - start)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
