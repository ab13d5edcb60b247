"""Memory, peak FLOP/s and link bandwidth of each kind of device, as published by its manufacturer."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

GIB = 2**30
GIGA, TERA = 1e9, 1e12
USABLE = 0.93
"""Fraction of device memory that tensors can use; the rest is driver, ECC and fragmentation."""


@dataclass(frozen=True)
class Device:
    """One GPU, or one CPU process's share of its machine."""

    name: str
    source: str
    memory: float
    """Bytes."""
    bf16_flops: float
    """Dense FLOP/s in bfloat16."""
    fp32_flops: float
    """Dense FLOP/s in float32 without TF32, which the trainer does not enable."""
    link: float
    """Bytes per second in each direction to the other GPUs of a machine."""
    network: float
    """Bytes per second in each direction to other machines, per GPU."""
    overhead: float
    """Bytes per process besides tensors: libraries, CUDA context and workspaces, without NCCL's buffers."""
    overhead_many: float
    """Additional bytes with several processes: NCCL's buffers."""

    def flops(self, dtype: str) -> float:
        return self.bf16_flops if dtype == "bf16" else self.fp32_flops


def _gpu(name: str, source: str, gib: float, bf16: float, fp32: float, link: float, network: float) -> Device:
    """gib: memory. bf16, fp32: TFLOP/s. link, network: GB/s in each direction.

    A CUDA context with kernels and workspaces takes about 1 GiB, NCCL's buffers about as much.
    """
    return Device(
        name, source, gib * GIB * USABLE, bf16 * TERA, fp32 * TERA, link * GIGA, network * GIGA, 1.0 * GIB, 1.0 * GIB
    )


# NVLink and PCIe bandwidth is published as the sum of both directions. Network: one port per GPU, as in NVIDIA's DGX
# systems (H100 and H200: 400 Gb/s, A100: 200 Gb/s); 100 Gb/s is assumed for cards without NVLink.
GPUS = {
    "h200": _gpu("h200", "NVIDIA H200 SXM datasheet", 141, 989, 67, 450, 50),
    "h100": _gpu("h100", "NVIDIA H100 SXM datasheet", 80, 989, 67, 450, 50),
    "a100-80": _gpu("a100-80", "NVIDIA A100 80GB SXM datasheet", 80, 312, 19.5, 300, 25),
    "a100-40": _gpu("a100-40", "NVIDIA A100 40GB SXM datasheet", 40, 312, 19.5, 300, 25),
    "l40s": _gpu("l40s", "NVIDIA L40S datasheet", 48, 362, 91.6, 32, 12.5),
    "4090": _gpu("4090", "NVIDIA Ada GPU architecture whitepaper, GeForce RTX 4090", 24, 165.2, 82.6, 32, 12.5),
}
KINDS = (*GPUS, "cpu")


def device(kind: str, *, num_processes: int, dtype: str) -> Device:
    """The device of each process; `cpu` is this machine, its memory and FLOP/s divided among the processes."""
    if kind != "cpu":
        return GPUS[kind]
    import torch

    from rm_gallery.distributed.cpu import matrix_flops

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rate = matrix_flops(torch.bfloat16 if dtype == "bf16" else torch.float32, seconds=0.5) / num_processes
    source = "this machine, matmul rate measured"
    return Device("cpu", source, memory * USABLE / num_processes, rate, rate, math.inf, math.inf, 0.6 * GIB, 0.0)
