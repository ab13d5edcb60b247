"""kernels: each attention kernel against the visibility rule in float64, forward and backward; and its time.

The cases are also those of tests/modeling/attention.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.systems import BUDGET, STEP_PAIRS, make_groups, make_packs
from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.tokenization.token_group import TokenGroup
from rm_gallery.modeling.attention import dispatch, flex
from rm_gallery.modeling.attention.dispatch import AttentionSpec, PackLayout, attend, lay_out, reference_attention
from rm_gallery.modeling.attention.varlen import find_flash

SHAPES: dict[str, list[tuple[int, list[int]]]] = {
    "single tokens": [(0, [1]), (1, [1]), (0, [1, 1]), (1, [1, 1, 1])],
    "empty prefixes": [(0, [5, 130]), (0, [3])],
    "many responses": [(40, [3, 7, 1, 20] * 4), (0, [2] * 16)],
    "one of each length": [(129, [1, 64]), (128, [128]), (255, [257]), (1, [300, 2])],
}
"""name -> (tokens of the prefix, tokens of each response) of each group"""
LONG_SHAPES: dict[str, list[tuple[int, list[int]]]] = {
    "8192 tokens": [(8191, [1])],
    "long responses": [(0, [4096, 4000]), (2000, [1024, 1, 700])],
    "long prefix, 16 responses": [(3000, [100] * 16)],
    "prefix of 4096": [(4096, [300, 1, 700])],
    "1 to 16 responses": [(7 * count, [11 + count] * count) for count in range(1, 17)],
}
"""Too long for a CPU."""
HEADS = [(4, 4, 64), (4, 2, 64), (8, 1, 128)]
"""(heads, key heads, head dimension)"""
FEATURES: list[dict[str, Any]] = [{}, {"softcap": 2.0}, {"has_sinks": True}, {"softcap": 2.0, "has_sinks": True},
                                  {"chunk": 5}]  # fmt: skip
"""Options of `Case` that not every kernel supports."""
_COMPILED_ON_CPU = ("many responses", "one of each length")
"""Shapes of FlexAttention on a CPU; each is compiled on its own."""
EXACT, ROUNDED = 2e-5, 2e-2
"""Bounds of the error in float32 on a CPU, and in bfloat16, which has 8 bits."""
_MAX_CELLS = 2**24
"""Attention scores that the reference computes at once."""
EXACT_ON_GPU = 1e-4
"""In float32 on a GPU, with other orders of summation. TF32 has 11 bits and is far above it."""


def layout_of(shape: Sequence[tuple[int, list[int]]], device: torch.device, kernel: str = "auto") -> PackLayout:
    groups = [
        TokenGroup(np.zeros(prefix, np.int32), [np.zeros(tail, np.int32) for tail in tails], ())
        for prefix, tails in shape
    ]
    return lay_out(collate(groups).to(device), kernel)


def draw_inputs(
    num_tokens: int, heads: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Query [T, H, D], key and value [T, G, D], and the gradient of the output."""
    num_heads, key_heads, size = heads
    draw = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(num_tokens, count, size, generator=draw).to(device, dtype)
        for count in (num_heads, key_heads, key_heads, num_heads)
    ]
    return parts[:3], parts[3]


class Case:
    """Random inputs over a layout, and what the visibility rule gives for them in float64."""

    def __init__(
        self, layout: PackLayout, heads: tuple[int, int, int], dtype: torch.dtype, *, window: int | None = None,
        backward: bool = True, softcap: float | None = None, has_sinks: bool = False, chunk: int | None = None,
    ) -> None:  # fmt: skip
        self.backward = backward
        self.spec = AttentionSpec(0.1, window, softcap, chunk=chunk)
        self.inputs, self.gradient = draw_inputs(len(layout.labels), heads, layout.device, dtype)
        if has_sinks:
            self.inputs.append(torch.linspace(-2.0, 3.0, heads[0], device=layout.device).to(dtype))
        self.wanted = self._reference(layout.labels, heads[0] // heads[1])

    def _reference(self, labels: Tensor, repeats: int) -> list[Tensor]:
        """Output, and the gradients of the inputs; of long packs head by head, which bounds memory."""
        query, key, value, *sinks = inputs = [part.double().requires_grad_(self.backward) for part in self.inputs]
        heads = [(slice(None), slice(None))]  # query heads and key heads
        if query.shape[1] * len(labels) ** 2 > _MAX_CELLS:
            heads = [(slice(h, h + 1), slice(h // repeats, h // repeats + 1)) for h in range(query.shape[1])]
        outputs = []
        for some, shared in heads:
            q, k, v = query[:, some].transpose(0, 1), key[:, shared].transpose(0, 1), value[:, shared].transpose(0, 1)
            spec = replace(self.spec, sinks=sinks[0][some] if sinks else None)
            output = reference_attention(q, k, v, labels, spec)  # [T, heads, D]
            if self.backward:
                output.backward(self.gradient[:, some].double())
            outputs.append(output.detach())
        gradients = [part.grad for part in inputs if part.grad is not None]
        return [torch.cat(outputs, 1), *gradients]

    def error(self, run: Callable[..., Tensor]) -> float:
        """Largest error of output and gradients, relative to each one's maximum.

        run: (query, key, value, spec) -> [T, H, D].
        """
        inputs = [part.clone().requires_grad_(self.backward) for part in self.inputs]
        found = [run(*inputs[:3], replace(self.spec, sinks=inputs[3] if inputs[3:] else None))]
        if self.backward:
            found += torch.autograd.grad(found[0], inputs, self.gradient)
        shares = [
            (mine.detach().double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)
            for mine, exact in zip(found, self.wanted, strict=True)
        ]
        return float(torch.stack(shares).max())


def worst_difference(
    run: Callable[..., Tensor], layout: PackLayout, heads: tuple[int, int, int], dtype: torch.dtype, **options: Any
) -> float:
    """The error of one kernel in one case; options: those of `Case`. See `Case.error`."""
    return Case(layout, heads, dtype, **options).error(run)


def run(report: Report) -> None:
    device = report.device
    shapes = SHAPES if device.type == "cpu" else {**SHAPES, **LONG_SHAPES}
    heads, kernels = HEADS, _kernels(report)
    if report.tiny:
        shapes, heads = {"many responses": SHAPES["many responses"]}, HEADS[1:2]
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        bound = ROUNDED if name == "bf16" else EXACT_ON_GPU if device.type == "cuda" else EXACT
        errors: dict[str, dict[str, float | str]] = {
            kernel: {} for kernel in kernels if not (kernel == "varlen" and name == "fp32")
        }
        with report.check(f"kernels in {name}"):
            for each in heads:
                for features in FEATURES:
                    _forget_compiled()
                    _measure_errors(errors, shapes, each, dtype, device, features)
        for kernel, found in errors.items():
            _add_errors(report, f"{kernel} {name}", found, bound)
    with report.check("reward queries"):
        _check_reward_queries(report, shapes)
    with report.check("time"):
        _forget_compiled()
        _measure_times(report, [name for name in kernels if name != ("plain" if device.type == "cuda" else "flex")])


def _kernels(report: Report) -> list[str]:
    """The kernels that run here; the others are named."""
    if report.device.type == "cuda":
        if find_flash() is not None:
            return ["varlen", "flex", "sdpa", "plain"]
        report.add("varlen", False, "this GPU and torch have no such kernel")
        return ["flex", "sdpa", "plain"]
    report.skip("varlen", "needs a GPU")
    has_compiler = shutil.which("g++") is not None or shutil.which("clang++") is not None
    if not has_compiler or report.tiny:
        report.skip("flex", "compiled on a CPU it needs a C++ compiler" if not has_compiler else "not in this size")
    return ["plain", "sdpa", *(["flex"] if has_compiler and not report.tiny else [])]


def _forget_compiled() -> None:
    """As in a run, FlexAttention is compiled for one type and number of heads only."""
    flex._kernel.cache_clear()
    torch._dynamo.reset()


def _measure_errors(
    errors: dict[str, dict[str, float | str]], shapes: dict[str, list[tuple[int, list[int]]]],
    heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device, features: dict[str, Any],
) -> None:  # fmt: skip
    """Fill in kernel -> case -> its error, or the exception as text.

    Features other than a window are measured with one number of heads, in the kernels that have them.
    """
    if features and heads != HEADS[1]:
        return
    errors = {kernel: found for kernel, found in errors.items() if supports(kernel, features)}
    for shape, groups in shapes.items():
        for window in (None, 100 if device.type == "cuda" else 6):
            cases: dict[bool, Case] = {}
            for kernel, found in errors.items():
                backward = not (kernel == "flex" and device.type == "cpu")
                if not backward and (heads != HEADS[1] or shape not in _COMPILED_ON_CPU):
                    continue
                layout = layout_of(groups, device, kernel)
                if backward not in cases:
                    cases[backward] = Case(layout, heads, dtype, window=window, backward=backward, **features)
                try:
                    with torch.set_grad_enabled(backward):
                        error: float | str = cases[backward].error(_call(kernel, layout))
                except Exception as raised:  # the other cases are still measured
                    error = f"{type(raised).__name__}: {' '.join(str(raised).split())[:300]}"
                found[f"{shape}, heads {heads}, window {window}{''.join(f', {each}' for each in features)}"] = error


def supports(kernel: str, features: dict[str, Any]) -> bool:
    """Whether a kernel supports these options of `Case`."""
    fields = {"sinks" if name == "has_sinks" else name for name in features}
    return fields <= dispatch.takes(kernel)


def _call(kernel: str, layout: PackLayout) -> Callable[..., Tensor]:
    def call(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        if kernel == "flex" and layout.device.type == "cpu":
            with compiled_flex():
                return flex.flex_attention(query, key, value, layout, spec)
        return attend(query, key, value, layout, spec)

    return call


@contextmanager
def compiled_flex() -> Iterator[None]:
    """FlexAttention on a CPU is compiled in this block, forward only; `flex_attention` itself runs it uncompiled."""
    from torch.nn.attention.flex_attention import flex_attention

    kernel = flex._kernel
    compiled = _compiled(flex_attention)
    flex._kernel = lambda _: compiled
    try:
        yield
    finally:
        flex._kernel = kernel


@lru_cache(maxsize=1)
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=False)  # Inductor's C++ for lengths that vary does not compile (torch 2.13)


def _add_errors(report: Report, what: str, found: dict[str, float | str], bound: float) -> None:
    problems = {case: error for case, error in found.items() if isinstance(error, str) or not error <= bound}
    numbers = [error for error in found.values() if not isinstance(error, str)]
    figure = f"{len(found)} cases, error {max(numbers, default=math.nan):.2g}"
    if problems:
        case, error = next(iter(problems.items()))
        figure = f"{len(problems)} of {len(found)} cases: {case}: {error}"
    report.add(what, bool(found) and not problems, figure, f"{bound:g}", errors=found)


def _check_reward_queries(report: Report, shapes: dict[str, list[tuple[int, list[int]]]]) -> None:
    """The last layer's queries, of reward tokens only, give the same rows as all queries."""
    worst = 0.0
    for groups in shapes.values():
        layout = layout_of(groups, report.device, "sdpa")
        (query, key, value), _ = draw_inputs(len(layout.labels), (4, 2, 64), report.device, torch.float32)
        rows, spec = layout.reward_index, AttentionSpec(0.1, 9)
        full = attend(query, key, value, layout, spec)[rows]
        only = attend(query[rows], key, value, layout, spec, rewards_only=True)
        worst = max(worst, float((only - full).abs().max() / full.abs().max()))
    report.add("reward queries fp32", worst <= EXACT_ON_GPU, f"error {worst:.2g}", f"{EXACT_ON_GPU:g}")


def _measure_times(report: Report, kernels: Sequence[str]) -> None:
    """Forward and backward of one pack in bfloat16, against sdpa on the same texts, padded."""
    scale, heads = (1.0, (12, 2, 128)) if report.device.type == "cuda" else (0.1, (4, 2, 64))
    groups = make_groups(STEP_PAIRS if not report.tiny else 2, 1000, scale)
    [pack, *_] = make_packs(groups, int(BUDGET * scale), 1536)
    milliseconds = {}
    for kernel in kernels:
        layout = lay_out(pack.to(report.device), kernel)
        inputs, gradient = draw_inputs(len(layout.labels), heads, report.device, torch.bfloat16)
        milliseconds[kernel] = _time(_call(kernel, layout), inputs, gradient, report)
    lengths = [length - sum(tails) + tail for length, tails in zip(pack.group_lengths, pack.tail_lengths, strict=True)
               for tail in tails]  # fmt: skip
    padded, gradient = draw_inputs(len(lengths) * max(lengths), heads, report.device, torch.bfloat16)

    def sdpa(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        texts = [part.view(len(lengths), max(lengths), -1, part.shape[-1]).transpose(1, 2) for part in
                 (query, *(each.repeat_interleave(heads[0] // heads[1], 1) for each in (key, value)))]  # fmt: skip
        out = F.scaled_dot_product_attention(*texts, is_causal=True, scale=spec.scaling)
        return out.transpose(1, 2).reshape(query.shape)

    milliseconds["padded"] = _time(sdpa, padded, gradient, report)
    ratios = [f"{name} {milliseconds['padded'] / milliseconds[name]:.1f}" for name in kernels]
    report.add("padded time over kernel", None, ", ".join(ratios), milliseconds=milliseconds, tokens=pack.num_tokens)


def _time(call: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor, report: Report) -> float:
    """Median milliseconds."""
    inputs = [part.requires_grad_() for part in inputs]
    times: list[float] = []
    end = time.monotonic() + report.seconds(1.5)
    for number in range(200):
        report.wait()
        start = time.perf_counter()
        torch.autograd.grad(call(*inputs, AttentionSpec(0.1)), inputs, gradient)
        report.wait()
        if number >= 2:  # the first ones compile and select kernels
            times.append(1e3 * (time.perf_counter() - start))
        if len(times) >= 3 and time.monotonic() > end:
            break
    return statistics.median(times)
