"""Every kernel against the reference, forward and backward.

GPU kernels are tested on the CPU too: the variable-length one with its own gathering around a plain implementation,
FlexAttention uncompiled, forward only, and its block map against the visibility rule.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rm_gallery.errors import UserError
from rm_gallery.modeling.attention import dispatch
from rm_gallery.modeling.attention.cpu import split_attention
from rm_gallery.modeling.attention.dispatch import AttentionSpec, Kernel, attend, check, visible
from rm_gallery.modeling.attention.flex import BLOCK, block_map, flex_attention
from rm_gallery.modeling.attention.varlen import Sequences, find_flash, make_sequences, varlen_attention
from tests.modeling.attention.cases import (
    EXACT,
    EXACT_ON_GPU,
    HEADS,
    LONG_SHAPES,
    ROUNDED,
    SHAPES,
    SHAPES_AND_HEADS,
    draw_inputs,
    layout_of,
    worst_difference,
)

CPU = torch.device("cpu")
FLEX_CASES = [("many responses", HEADS[1], None), ("one of each length", HEADS[1], 6)]
"""Cases of FlexAttention that `make test` runs: a CPU takes long for them."""


def plain_flash(q: Tensor, k: Tensor, v: Tensor, s: Sequences, scaling: float, window: int | None) -> Tensor:
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
        outputs.append((logits.masked_fill(~seen, float("-inf")).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("shape", "heads"), SHAPES_AND_HEADS)
@pytest.mark.parametrize("kernel", ["plain", "sdpa"])
def test_cpu_kernels(kernel: str, shape: str, heads: tuple[int, int, int], window: int | None) -> None:
    layout = layout_of(SHAPES[shape], CPU, kernel)
    for dtype, tolerance in ((torch.float32, EXACT), (torch.bfloat16, ROUNDED)):
        difference = worst_difference(
            lambda q, k, v, scaling: attend(q, k, v, layout, AttentionSpec(scaling, window)),
            layout, heads, dtype, window=window,
        )  # fmt: skip
        assert difference < tolerance


@pytest.mark.parametrize(("shape", "heads"), SHAPES_AND_HEADS)
def test_split_attention_equals_the_reference(shape: str, heads: tuple[int, int, int]) -> None:
    layout = layout_of(SHAPES[shape], CPU)
    difference = worst_difference(
        lambda q, k, v, scaling: split_attention(q, k, v, layout, AttentionSpec(scaling)),
        layout, heads, torch.float32, backward=False,
    )  # fmt: skip
    assert difference < EXACT


@pytest.mark.parametrize(
    ("length", "window", "is_split"), [(60, None, True), (60, 100, True), (60, 99, False), (10, None, False)]
)
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
                lambda q, k, v, scaling: attend(q, k, v, layout, AttentionSpec(scaling, window)),
                layout, HEADS[1], dtype, window=window, backward=grad,
            )  # fmt: skip
        assert difference < (EXACT if dtype == torch.float32 else ROUNDED)
    assert bool(calls) == is_split


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("shape", "heads"), SHAPES_AND_HEADS)
def test_varlen_equals_the_reference(shape: str, heads: tuple[int, int, int], window: int | None) -> None:
    layout = layout_of(SHAPES[shape], CPU)
    difference = worst_difference(
        lambda q, k, v, scaling: varlen_attention(
            q, k, v, layout, AttentionSpec(scaling, window), flash=plain_flash
        ),
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
        lambda q, k, v, scaling: flex_attention(q, k, v, layout, AttentionSpec(scaling, window)),
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


def test_plain_attention_refuses_dropout() -> None:
    with pytest.raises(UserError, match=r"model\.dropout is not 0"):
        check("plain", CPU, torch.float32, 0.1)
    check("sdpa", CPU, torch.float32, 0.1)
    check("auto", CPU, torch.float32, 0.1)


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
        lambda q, k, v, scaling: attend(q, k, v, layout, AttentionSpec(scaling, window)),
        layout, heads, dtype, window=window,
    )  # fmt: skip
    assert difference < (ROUNDED if dtype == torch.bfloat16 else EXACT_ON_GPU)
