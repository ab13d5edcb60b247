"""emulate: what can be found out about a GPU's code paths without a GPU; runs with --device cpu only.

- Liger's Triton kernels in Triton's interpreter, forward and backward, against the library's modules.
- torch's variable-length attention on the meta device, whose tensors have shapes and strides but no values.
- FSDP2, hybrid sharding and DDP of several ranks over a fake process group, whose collectives return at once.

FlexAttention compiled for the CPU is in `kernels`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu_check.kernels import HEADS, SHAPES, draw_inputs, layout_of
from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.small_model import TINY, make_data, make_folder, model_config
from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.distributed.process_group import World
from rm_gallery.modeling.attention import varlen
from rm_gallery.modeling.attention.layout import AttentionSpec
from rm_gallery.modeling.parallel import master_weights
from rm_gallery.modeling.parallel.apply import apply, patch_modules
from rm_gallery.modeling.parallel.strategy import Strategy
from rm_gallery.modeling.reward_model import load_reward_model
from rm_gallery.objectives import OBJECTIVES

_ROOT = Path(__file__).resolve().parents[2]
_BOUND = 1e-4


def run(report: Report) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = make_folder(Path(name) / "model", TINY)
        with report.check("Liger interpreted"):
            _check_liger(report, folder)
        with report.check("varlen on meta"):
            report.add("varlen on meta", True, f"{check_varlen_shapes()} cases")
        for strategy, ranks, group_size in (("ddp", 8, -1), ("fsdp2", 8, -1), ("fsdp2", 8, 4)):
            what = f"{strategy}, {ranks} fake ranks" if group_size < 0 else f"hybrid, 2x{group_size} fake ranks"
            with report.check(what), fake_group(ranks):
                shapes = step_of_rank(folder, strategy, ranks, group_size)
                report.add(what, True, f"{len(shapes)} parameters", shapes=shapes)


def _check_liger(report: Report, folder: Path) -> None:
    missing = [name for name in ("triton", "liger_kernel") if importlib.util.find_spec(name) is None]
    if missing:
        report.skip("Liger interpreted", "not installed: " + ", ".join(missing))
        return
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check.emulate", str(folder)], cwd=_ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if ran.returncode:
        raise RuntimeError(ran.stderr[-600:])
    found = json.loads(ran.stdout.splitlines()[-1])
    report.add("Liger interpreted", found["error"] <= _BOUND, f"error {found['error']:.2g}", f"{_BOUND:g}", **found)


def liger_errors(folder: Path) -> dict[str, float]:
    """Largest relative difference of rewards and gradients with Liger's kernels; TRITON_INTERPRET=1 is set."""
    functional = _interpretable_liger()
    data = make_data(TINY)
    batch = collate([data[index] for index in range(4)])
    found = []
    for with_liger in (False, True):
        model = load_reward_model(str(folder)).model
        count = patch_modules(model.network, functional) if with_liger else 0
        rewards = model(batch)
        rewards.square().sum().backward()
        found.append([rewards.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    errors = [float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(*found, strict=True)]
    return {"error": max(errors), "modules": count}


def _interpretable_liger() -> Any:
    """Liger's functions, with what Triton's interpreter lacks: arguments of type float, functions of libdevice, and
    integers from arrays of one element, which recent versions of NumPy refuse."""
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import geglu, rms_norm
    from liger_kernel.transformers import functional
    from triton.runtime import interpreter

    convert, patch = interpreter._implicit_cvt, interpreter._patch_lang_tensor

    def with_floats(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return convert(argument)

    def with_integers(tensor: Any, *arguments: Any) -> None:
        patch(tensor, *arguments)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._implicit_cvt, interpreter._patch_lang_tensor = with_floats, with_integers

    rms_norm.rsqrt = lambda x: 1.0 / tl.sqrt(x)
    geglu.tanh = lambda x: 2.0 * tl.sigmoid(2.0 * x) - 1.0
    return functional


def check_varlen_shapes() -> int:
    """Run torch's kernel on the meta device, forward and backward, and return the number of cases.

    An argument, a type, a shape or a stride that the operator does not take raises here.
    """
    flash = varlen._from_torch()
    assert flash is not None, "this torch has no variable-length attention with windows"
    meta, count = torch.device("meta"), 0
    for groups in SHAPES.values():
        for heads in HEADS:
            for window in (None, 6):
                layout = layout_of(groups, meta)
                inputs, gradient = draw_inputs(len(layout.labels), heads, meta, torch.bfloat16)
                inputs = [part.requires_grad_() for part in inputs]
                out = varlen.varlen_attention(*inputs, layout, AttentionSpec(0.1, window), flash=flash)
                gradients = torch.autograd.grad(out, inputs, gradient)
                for mine, wanted in zip((out, *gradients), (inputs[0], *inputs), strict=True):
                    assert mine.shape == wanted.shape and mine.dtype == wanted.dtype
                    assert mine.stride() == wanted.stride()
                count += 1
    return count


@contextmanager
def fake_group(ranks: int) -> Iterator[None]:
    """A process group of this many ranks, of which only rank 0 exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    count = master_weights.world_size
    master_weights.world_size = lambda: ranks
    try:
        yield
    finally:
        master_weights.world_size = count
        dist.destroy_process_group()


def step_of_rank(folder: Path, strategy: Strategy, ranks: int, group_size: int = -1) -> dict[str, list[int]]:
    """A forward and a backward pass of rank 0; parameter -> shape of its gradient on this rank."""
    model = load_reward_model(str(folder)).model
    config = model_config("bf16", fsdp_size=group_size)
    weights = apply(model, config, World(0, ranks, torch.device("cpu")), strategy=strategy)
    data = make_data(TINY)
    batch = collate([data[index] for index in range(4)])
    loss, _ = OBJECTIVES["bradley_terry"](model(batch), batch)
    weights.backward(loss / 4, is_last=True)
    weights.gather_gradients(loss.detach().double(), 1.0)
    shapes = {}
    for name, parameter in weights.named_parameters():
        assert parameter.grad is not None, name
        shapes[name] = list(master_weights.local(parameter.grad).shape)
    return shapes


if __name__ == "__main__":
    print(json.dumps(liger_errors(Path(sys.argv[1]))))
