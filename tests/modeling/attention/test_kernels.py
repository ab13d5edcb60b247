"""Every kernel against the reference, forward and backward.

GPU kernels are tested on the CPU too: the variable-length one with its own gathering around a plain implementation,
FlexAttention uncompiled, forward only, and its block map against the visibility rule.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rm_gallery.errors import UserError
from rm_gallery.modeling.attention import cpu, dispatch
from rm_gallery.modeling.attention.cpu import split_attention
from rm_gallery.modeling.attention.dispatch import (
    AttentionSpec,
    Kernel,
    attend,
    check,
    reference_attention,
    takes,
    visible,
)
from rm_gallery.modeling.attention.flex import BLOCK, block_map, flex_attention
from rm_gallery.modeling.attention.varlen import Sequences, find_flash, make_sequences, varlen_attention
from tests.modeling.attention.cases import (
    EXACT,
    EXACT_ON_GPU,
    FEATURES,
    HEADS,
    LONG_SHAPES,
    ROUNDED,
    SHAPES,
    SHAPES_AND_HEADS,
    draw_inputs,
    layout_of,
    supports,
    worst_difference,
)

CPU = torch.device("cpu")
FLEX_CASES = [("many responses", HEADS[1], None), ("one of each length", HEADS[1], 6)]
"""Cases of FlexAttention that `make test` runs: a CPU takes long for them."""


def plain_flash(
    q: Tensor, k: Tensor, v: Tensor, s: Sequences, scaling: float, window: int | None, softcap: float | None = None
) -> Tensor:
    """A variable-length kernel in plain PyTorch: causal, aligned to the bottom right."""
    outputs = []
    for number in range(len(s.cu_seqlens_q) - 1):
        rows = slice(int(s.cu_seqlens_q[number]), int(s.cu_seqlens_q[number + 1]))
        columns = slice(int(s.cu_seqlens_k[number]), int(s.cu_seqlens_k[number + 1]))
        num_q, num_k = rows.stop - rows.start, columns.stop - columns.start
        assert 0 < num_q <= s.max_seqlen_q and num_k <= s.max_seqlen_k
        place = torch.arange(num_k - num_q, num_k)[:, None]
        seen = torch.arange(num_k)[None] <= place
        if window is not None:
            seen &= torch.arange(num_k)[None] > place - window
        heads = q.shape[1] // k.shape[1]
        keys, values = (part[columns].transpose(0, 1).repeat_interleave(heads, 0) for part in (k, v))
        logits = (q[rows].transpose(0, 1) @ keys.transpose(1, 2)) * scaling
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        outputs.append((logits.masked_fill(~seen, float("-inf")).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize(("shape", "heads"), SHAPES_AND_HEADS)
@pytest.mark.parametrize(
    ("kernel", "window"),
    [
        ("plain", 6),
        ("sdpa", None),
        pytest.param("plain", None, marks=pytest.mark.slow),
        pytest.param("sdpa", 6, marks=pytest.mark.slow),
    ],
)
def test_cpu_kernels(kernel: str, shape: str, heads: tuple[int, int, int], window: int | None) -> None:
    layout = layout_of(SHAPES[shape], CPU, kernel)
    for dtype, tolerance in ((torch.float32, EXACT), (torch.bfloat16, ROUNDED)):
        difference = worst_difference(
            lambda q, k, v, spec: attend(q, k, v, layout, spec),
            layout, heads, dtype, window=window,
        )  # fmt: skip
        assert difference < tolerance


@pytest.mark.parametrize(("shape", "heads"), SHAPES_AND_HEADS)
def test_split_attention_equals_the_reference(shape: str, heads: tuple[int, int, int]) -> None:
    layout = layout_of(SHAPES[shape], CPU)
    difference = worst_difference(
        lambda q, k, v, spec: split_attention(q, k, v, layout, spec),
        layout, heads, torch.float32, backward=False,
    )  # fmt: skip
    assert difference < EXACT


@pytest.mark.parametrize(
    ("length", "window", "is_split"), [(60, None, True), (60, 100, True), (60, 99, False), (10, None, False)]
)
@pytest.mark.slow
def test_auto_selects_split_attention_for_long_texts_unless_a_window_ends_inside_one(
    length: int, window: int | None, is_split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of([(40, [length] * 8), (3, [length] * 2)], CPU)
    calls = []
    split = Kernel(lambda *a, **k: (calls.append(1), split_attention(*a, **k))[1])
    monkeypatch.setitem(dispatch.KERNELS, "split", split)
    for grad, dtype in ((True, torch.float32), (False, torch.bfloat16), (False, torch.float32)):
        assert not calls, "forward only, and float32 only"
        with torch.set_grad_enabled(grad):
            difference = worst_difference(
                lambda q, k, v, spec: attend(q, k, v, layout, spec),
                layout, HEADS[1], dtype, window=window, backward=grad,
            )  # fmt: skip
        assert difference < (EXACT if dtype == torch.float32 else ROUNDED)
    assert bool(calls) == is_split


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("shape", "heads"), SHAPES_AND_HEADS)
def test_varlen_equals_the_reference(shape: str, heads: tuple[int, int, int], window: int | None) -> None:
    layout = layout_of(SHAPES[shape], CPU)
    difference = worst_difference(
        lambda q, k, v, spec: varlen_attention(q, k, v, layout, spec, flash=plain_flash),
        layout, heads, torch.float32, window=window,
    )  # fmt: skip
    assert difference < EXACT


def test_sequences_of_a_small_pack() -> None:
    sequences = make_sequences(layout_of([(2, [2, 1]), (0, [1])], CPU))
    assert sequences.cu_seqlens_q.tolist() == [0, 2, 4, 5, 6]
    assert sequences.cu_seqlens_k.tolist() == [0, 2, 6, 9, 10]
    assert sequences.key_tokens.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5]
    assert sequences.own_keys.tolist() == [0, 1, 4, 5, 8, 9]
    assert (sequences.max_seqlen_q, sequences.max_seqlen_k) == (2, 4)
    assert sequences.cu_seqlens_q.dtype == sequences.cu_seqlens_k.dtype == torch.int32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("shape", "heads", "window"),
    [
        pytest.param(shape, heads, window, marks=() if (shape, heads, window) in FLEX_CASES else pytest.mark.slow)
        for shape in SHAPES
        for heads in HEADS
        for window in (None, 6)
    ],
)
def test_flex_equals_the_reference(shape: str, heads: tuple[int, int, int], window: int | None) -> None:
    layout = layout_of(SHAPES[shape], CPU)
    difference = worst_difference(
        lambda q, k, v, spec: flex_attention(q, k, v, layout, spec),
        layout, heads, torch.float32, window=window, backward=False,
    )  # fmt: skip
    assert difference < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 6, 200])
@pytest.mark.parametrize("shape", [*SHAPES.values(), *LONG_SHAPES.values()][:6])
def test_block_map_has_every_block_with_a_visible_pair(shape: list[tuple[int, list[int]]], window: int | None) -> None:
    layout = layout_of(shape, CPU)
    partial, full = block_map(layout, window)
    num_tokens, size = len(layout.labels), len(partial) * BLOCK
    seen = np.zeros((size, size), bool)
    for start in range(0, num_tokens, BLOCK):
        rows = layout.labels[start : start + BLOCK]
        seen[start : start + len(rows), :num_tokens] = visible(rows, layout.labels, window).numpy()
    blocks = seen.reshape(len(partial), BLOCK, len(partial), BLOCK)
    assert not (partial & full).any()
    assert not (blocks.any((1, 3)) & ~(partial | full)).any()
    assert blocks.all((1, 3))[full].all()
    if window is None:
        assert blocks.any((1, 3))[partial].all()


@pytest.mark.parametrize("kernel", ["plain", "sdpa"])
def test_reward_queries_equal_the_same_rows_of_all_queries(kernel: str) -> None:
    for shape in SHAPES.values():
        layout = layout_of(shape, CPU, kernel)
        (query, key, value), _ = draw_inputs(len(layout.labels), (4, 2, 64), CPU, torch.float32)
        full = attend(query, key, value, layout, AttentionSpec(0.1, 9))
        rows = layout.reward_index
        only = attend(query[rows], key, value, layout, AttentionSpec(0.1, 9), rewards_only=True)
        torch.testing.assert_close(only, full[rows], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["varlen", "flex"])
def test_gpu_kernels_are_refused_on_a_cpu(kernel: str) -> None:
    with pytest.raises(UserError, match=f"model.attention={kernel}: it needs a GPU; set auto"):
        check(kernel, CPU, torch.bfloat16, 0.0)


def test_only_cpu_kernels_have_dropout() -> None:
    for kernel in ("plain", "sdpa", "auto"):
        check(kernel, CPU, torch.float32, 0.1)
    for kernel in ("varlen", "flex"):
        with pytest.raises(UserError, match=r"does not support attention dropout, and model\.dropout is not 0"):
            check(kernel, CPU, torch.float32, 0.1)


def test_dropout_keeps_the_mean_and_its_gradient_is_that_of_what_was_kept() -> None:
    layout = layout_of([(1, [1, 2])], CPU, "plain")
    inputs = [part.double().requires_grad_() for part in draw_inputs(4, (2, 1, 2), CPU, torch.float32)[0]]
    spec = AttentionSpec(0.3, softcap=2.0, sinks=torch.ones(2, dtype=torch.double), dropout=0.4)

    def run(*parts: Tensor) -> Tensor:
        torch.manual_seed(0)
        return attend(*parts, layout, spec)

    assert torch.autograd.gradcheck(run, inputs)
    torch.manual_seed(1)
    with torch.no_grad():
        mean = torch.stack([attend(*inputs, layout, spec) for _ in range(300)]).mean(0)
        wanted = attend(*inputs, layout, replace(spec, dropout=0.0))
    assert (mean - wanted).abs().mean() < 0.1 * wanted.abs().mean()


SMALL = [(5, [3, 9]), (0, [14]), (2, [1, 1, 8])]
"""Groups with texts that are longer than the windows and chunks of the tests, and short ones."""
KERNELS_AND_FEATURES = [
    *((kernel, each) for kernel in ("plain", "sdpa", "split") for each in FEATURES[1:] if supports(kernel, each)),
    ("varlen", {"softcap": 2.0}),  # flash-attn 2.6 and newer
]


@pytest.mark.parametrize(("kernel", "features"), KERNELS_AND_FEATURES, ids=str)
@pytest.mark.parametrize("shape", ["small", pytest.param("many responses", marks=pytest.mark.slow)])
def test_soft_caps_sinks_and_chunks(
    shape: str, kernel: str, features: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, gradients of the sinks included."""
    layout = layout_of({**SHAPES, "small": SMALL}[shape], CPU, kernel)
    run = {
        "plain": attend, "sdpa": attend, "split": split_attention,
        "varlen": partial(varlen_attention, flash=plain_flash),
    }[kernel]  # fmt: skip
    limit = 50 if shape != "small" else 12
    monkeypatch.setattr(cpu, "_SAVE_PROBABILITIES_UP_TO", limit)
    monkeypatch.setattr(cpu, "_MAX_SCORES", 8 * limit**2)  # some buckets in pieces
    for window, dtype, bound in ((None, torch.float64, 1e-12), (6, torch.float64, 1e-12), (6, torch.bfloat16, ROUNDED)):
        if kernel == "split" and (window or dtype == torch.bfloat16):
            continue
        difference = worst_difference(
            lambda q, k, v, spec: run(q, k, v, layout, spec),
            layout, HEADS[1], dtype, window=window, backward=kernel != "split", **features,
        )  # fmt: skip
        assert difference < (max(bound, 1e-6) if kernel == "varlen" else bound)  # it sums gradients in float32


@pytest.mark.parametrize("left_out", ["softcap", "sinks", "chunk", "window"])
def test_the_reference_differs_without_each_field(left_out: str) -> None:
    layout = layout_of(SMALL, CPU)
    (query, key, value), _ = draw_inputs(len(layout.labels), HEADS[0], CPU, torch.float32)
    parts = [part.transpose(0, 1) for part in (query, key, value)]
    spec = AttentionSpec(0.3, window=6, softcap=2.0, sinks=torch.linspace(-1.0, 1.0, 4), chunk=8)
    outputs = [reference_attention(*parts, layout.labels, each) for each in (spec, replace(spec, **{left_out: None}))]
    assert (outputs[0] - outputs[1]).abs().max() > 0.05


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("features", FEATURES[1:], ids=str)
def test_soft_caps_sinks_and_chunks_of_flex(features: dict[str, Any]) -> None:
    layout = layout_of(SHAPES["many responses"], CPU)
    for window in (None, 6):
        difference = worst_difference(
            lambda q, k, v, spec: flex_attention(q, k, v, layout, spec),
            layout, HEADS[1], torch.float32, window=window, backward=False, **features,
        )  # fmt: skip
        assert difference < EXACT


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("rewards_only", [True, False])
def test_some_kernel_takes_every_field(device: str, rewards_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU too, which the meta device stands for, with and without kernels of its own."""
    spec = AttentionSpec(1.0, 4, softcap=2.0, sinks=torch.zeros(4), dropout=0.1, chunk=3)
    for has_flex, length in product((True, False), (3, 3000)):
        monkeypatch.setattr(dispatch, "flex_is_available", lambda has=has_flex: has)
        monkeypatch.setattr(dispatch, "find_flash", lambda: plain_flash)
        monkeypatch.setattr(dispatch, "takes_softcap", lambda: True)
        layout = layout_of([(5, [length, 2])], torch.device("cpu"))
        query = torch.zeros(len(layout.labels), 4, 64, device=device, dtype=torch.bfloat16)
        for names in ("softcap", "sinks", "dropout", "chunk"), ("softcap",), ("sinks",), ("chunk",):
            fields = {name: getattr(spec, name) for name in names}
            kernel = dispatch._choose(query, layout, AttentionSpec(1.0, **fields), rewards_only)
            name = next(name for name, each in dispatch.KERNELS.items() if each is kernel)
            assert set(names) <= takes(name)


def test_a_kernel_of_the_settings_that_lacks_a_field_is_refused_in_words() -> None:
    layout = layout_of([(2, [2, 1])], CPU, "sdpa")
    (query, key, value), _ = draw_inputs(5, HEADS[1], CPU, torch.float32)
    with pytest.raises(UserError, match=r"model\.attention=sdpa does not support a soft cap, which the model has; set"):
        attend(query, key, value, layout, AttentionSpec(1.0, softcap=3.0))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("features", FEATURES[1:], ids=str)
@pytest.mark.parametrize("shape", ["many responses", "one of each length", "8192 tokens"])
@pytest.mark.parametrize("kernel", ["sdpa", "varlen", "flex", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_soft_caps_sinks_and_chunks_of_gpu_kernels(
    dtype: torch.dtype, kernel: str, shape: str, features: dict[str, Any], window: int | None
) -> None:
    device = torch.device("cuda")
    if (kernel == "varlen" and (dtype == torch.float32 or find_flash() is None)) or not supports(kernel, features):
        pytest.skip("the choice falls through to another kernel")
    layout = layout_of({**SHAPES, **LONG_SHAPES}[shape], device, kernel)
    difference = worst_difference(
        lambda q, k, v, spec: attend(q, k, v, layout, spec), layout, HEADS[1], dtype, window=window, **features
    )
    assert difference < (ROUNDED if dtype == torch.bfloat16 else EXACT_ON_GPU)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("shape", {**SHAPES, **LONG_SHAPES})
@pytest.mark.parametrize("kernel", ["sdpa", "varlen", "flex"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_kernels(
    dtype: torch.dtype, kernel: str, shape: str, heads: tuple[int, int, int], window: int | None
) -> None:
    device = torch.device("cuda")
    if kernel == "varlen" and (dtype == torch.float32 or find_flash() is None):
        pytest.skip("flash attention has no float32, or there is none here; its gathering is tested on the CPU")
    layout = layout_of({**SHAPES, **LONG_SHAPES}[shape], device, kernel)
    difference = worst_difference(
        lambda q, k, v, spec: attend(q, k, v, layout, spec),
        layout, heads, dtype, window=window,
    )  # fmt: skip
    assert difference < (ROUNDED if dtype == torch.bfloat16 else EXACT_ON_GPU)
