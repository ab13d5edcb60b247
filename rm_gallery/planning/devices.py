"""Memory, peak FLOP/s and link bandwidth of each kind of device, as published by its manufacturer."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

GIB = 2**30
GIGA, TERA = 1e9, 1e12
USABLE = 0.93
"""Fraction of device memory that tensors can use; the rest is driver, ECC and fragmentation."""
GPU_MARGIN = 0.05
"""A run fits if the estimate may be this much too low. On an H100 it was 0.4% and 3.1% too high, see docs/log.md."""
CPU_MARGIN = 0.25
"""A process that trains on a CPU keeps what it has freed: 14 to 24% more than the estimate, see docs/estimate.md."""


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
    margin: float = GPU_MARGIN
    """Share by which the estimate may be too low."""
    has_bf16: bool = True
    """False: bfloat16 is emulated, at the rate of float32 at best."""

    @property
    def limit(self) -> float:
        """Bytes that an estimate may have to fit."""
        return self.memory / (1 + self.margin)

    def flops(self, dtype: str) -> float:
        return self.bf16_flops if dtype == "bf16" else self.fp32_flops


def _gpu(
    name: str, source: str, gib: float, bf16: float | None, fp32: float, link: float, network: float = 12.5
) -> Device:
    """gib: memory. bf16 (None: no such units), fp32: TFLOP/s. link, network: GB/s in each direction.

    A CUDA context with kernels and workspaces takes about 1 GiB, NCCL's buffers about as much.
    """
    return Device(
        name, source, gib * GIB * USABLE, (bf16 or fp32) * TERA, fp32 * TERA, link * GIGA, network * GIGA,
        1.0 * GIB, 1.0 * GIB, has_bf16=bf16 is not None,
    )  # fmt: skip


# Published tensor rates are often with 2:4 sparsity, which doubles them; these are dense, bfloat16 with float32
# accumulation. NVLink, Infinity Fabric and PCIe bandwidth is published as the sum of both directions; NVLink bridges
# between two cards do not count. Network: one port per GPU, as in DGX systems (B200, H200, H100: 400 Gb/s, A100: 200
# Gb/s) and MI300X servers (400 Gb/s); 100 Gb/s is assumed for cards without such links.
GPUS = {
    "b200": _gpu("b200", "NVIDIA HGX B200 datasheet", 180, 2250, 75, 900, 50),
    "h200": _gpu("h200", "NVIDIA H200 SXM datasheet", 141, 989, 67, 450, 50),
    "h100": _gpu("h100", "NVIDIA H100 SXM datasheet", 80, 989, 67, 450, 50),
    "a100-80": _gpu("a100-80", "NVIDIA A100 80GB SXM datasheet", 80, 312, 19.5, 300, 25),
    "a100-40": _gpu("a100-40", "NVIDIA A100 40GB SXM datasheet", 40, 312, 19.5, 300, 25),
    "mi300x": _gpu("mi300x", "AMD Instinct MI300X datasheet", 192, 1307.4, 163.4, 448, 50),
    "l40s": _gpu("l40s", "NVIDIA L40S datasheet", 48, 362, 91.6, 32),
    "a6000": _gpu("a6000", "NVIDIA Ampere GA102 whitepaper, RTX A6000", 48, 154.8, 38.7, 32),
    "4090": _gpu("4090", "NVIDIA Ada GPU architecture whitepaper, GeForce RTX 4090", 24, 165.2, 82.6, 32),
    "3090": _gpu("3090", "NVIDIA Ampere GA102 whitepaper, GeForce RTX 3090", 24, 71, 35.6, 32),
    "l4": _gpu("l4", "NVIDIA L4 datasheet", 24, 121, 30.3, 32),
    "a10g": _gpu("a10g", "NVIDIA A10G datasheet of AWS", 24, 70, 35, 32),
    "t4": _gpu("t4", "NVIDIA T4 datasheet", 16, None, 8.1, 16),
}
KINDS = (*GPUS, "cpu")


def has_bf16(kind: str) -> bool:
    """Whether `model.fsdp_config.model_dtype=auto` is bf16 on this device."""
    if kind != "cpu":
        return GPUS[kind].has_bf16
    from rm_gallery.distributed.cpu import has_bf16_units

    return has_bf16_units()


def device(kind: str, *, num_processes: int, dtype: str) -> Device:
    """The device of each process; `cpu` is this machine, its memory and FLOP/s divided among the processes."""
    if kind != "cpu":
        return GPUS[kind]
    import torch

    from rm_gallery.distributed.cpu import matrix_flops

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rate = matrix_flops(torch.bfloat16 if dtype == "bf16" else torch.float32, seconds=0.5) / num_processes
    return Device(
        "cpu", "this machine, matmul rate measured", memory * USABLE / num_processes, rate, rate, math.inf, math.inf,
        0.6 * GIB, 0.0, margin=CPU_MARGIN,
    )  # fmt: skip
