"""What training runs on: memory, peak rates and links of each kind of device, as its maker publishes them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

GIB = 2**30
GIGA, TERA = 1e9, 1e12
USABLE = 0.93
"""Share of a memory that tensors can fill; the rest goes to the driver, to error correction and to fragments."""


@dataclass(frozen=True)
class Device:
    """One GPU, or the share of one CPU process in its machine."""

    name: str
    source: str
    memory: float
    """Bytes."""
    bf16_flops: float
    """Dense matrix products a second, in bfloat16."""
    fp32_flops: float
    """The same in float32, without TF32, which the trainer does not switch on."""
    link: float
    """Bytes a second each way to the other GPUs of a machine."""
    network: float
    """Bytes a second each way to other machines, for each GPU."""
    overhead: float
    """Bytes that a process takes besides tensors: libraries, CUDA context, workspaces; NCCL's buffers come on top."""
    overhead_many: float
    """Bytes more when there are several processes."""

    def flops(self, dtype: str) -> float:
        return self.bf16_flops if dtype == "bf16" else self.fp32_flops


def _gpu(name: str, source: str, gib: float, bf16: float, fp32: float, link: float, network: float) -> Device:
    """Memory in GiB, rates in TFLOP/s, links in GB/s each way.

    A context with the libraries' kernels and workspaces takes about 1 GiB, NCCL's buffers about as much.
    """
    return Device(
        name, source, gib * GIB * USABLE, bf16 * TERA, fp32 * TERA, link * GIGA, network * GIGA, 1.0 * GIB, 1.0 * GIB
    )


# NVLink and PCIe are published as the sum of both ways. Networks: one port for each GPU of NVIDIA's reference machines
# (DGX H100 and H200: 400 Gb/s, DGX A100: 200 Gb/s); for cards without NVLink 100 Gb/s are assumed.
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
    """The device of each process; `cpu` is this machine, its memory and rate split over the processes."""
    if kind != "cpu":
        return GPUS[kind]
    import torch

    from rm_gallery.distributed.cpu import matrix_flops

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rate = matrix_flops(torch.bfloat16 if dtype == "bf16" else torch.float32, seconds=0.5) / num_processes
    source = "this machine, its matrix products measured just now"
    return Device("cpu", source, memory * USABLE / num_processes, rate, rate, math.inf, math.inf, 0.6 * GIB, 0.0)
