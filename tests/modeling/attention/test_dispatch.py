"""Packed attention against the reference, forward and backward; buckets; the choice of a kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.tokenization.token_group import TokenGroup
from rm_gallery.modeling.attention import dispatch
from rm_gallery.modeling.attention.dispatch import (
    AttentionSpec,
    Kernel,
    attend,
    lay_out,
    packed_attention,
    reference_attention,
    visible,
)
from tests.small import fast_first, random_groups

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def test_visibility_rule() -> None:
    #   group, response, position: a common prefix of two tokens, two responses, and a second group
    labels = torch.tensor([[0, -1, 0], [0, -1, 1], [0, 0, 2], [0, 0, 3], [0, 1, 2], [1, 2, 0]])
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert visible(labels, labels).int().tolist() == expected
    assert visible(labels, labels, window=2)[3].int().tolist() == [0, 0, 1, 1, 0, 0]
    assert visible(labels, labels, window=2)[4].int().tolist() == [0, 1, 0, 0, 1, 0]
    assert visible(labels, labels, chunk=2)[3].int().tolist() == [0, 0, 1, 1, 0, 0]
    assert visible(labels, labels, chunk=3)[4].int().tolist() == [1, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 16), (4, 2, 64), (8, 1, 128)])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_kernel_equals_the_reference(
    device: str, heads: int, kv_heads: int, size: int, window: int | None, seed: int
) -> None:
    where = torch.device(device)
    batch = collate(random_groups(seed) + random_groups(seed + 10, most=9)).to(where)
    layout = lay_out(batch)
    draw = torch.Generator().manual_seed(seed)
    inputs = [
        torch.randn(1, count, batch.num_tokens, size, generator=draw).to(where).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]
    weight = torch.randn(batch.num_tokens, heads, size, generator=draw).to(where)
    found, _ = packed_attention(torch.nn.Identity(), *inputs, None, packed=layout, scaling=0.2, sliding_window=window)
    wanted = reference_attention(*(part[0] for part in inputs), layout.labels, AttentionSpec(0.2, window))
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=0)
    gradients = [torch.autograd.grad((out * weight).sum(), inputs) for out in (found[0], wanted)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_is_within_rounding(device: str) -> None:
    where = torch.device(device)
    batch = collate(random_groups(3)).to(where)
    layout = lay_out(batch)
    draw = torch.Generator().manual_seed(3)
    inputs = [torch.randn(1, 4, batch.num_tokens, 64, generator=draw).to(where) for _ in range(3)]
    rounded = [part.bfloat16() for part in inputs]
    found, _ = packed_attention(torch.nn.Identity(), *rounded, None, packed=layout, scaling=0.125)
    wanted = reference_attention(*(part[0].float() for part in rounded), layout.labels, AttentionSpec(0.125))
    torch.testing.assert_close(found[0].float(), wanted, atol=3e-2, rtol=3e-2)


def test_buckets_contain_every_token_once_and_little_padding() -> None:
    batch = collate([group for seed in range(8) for group in random_groups(seed)])
    layout = lay_out(batch)
    rows = torch.cat([bucket.key_tokens.reshape(-1) for bucket in layout.all_tokens.buckets])
    assert torch.equal(rows[layout.all_tokens.restore], torch.arange(batch.num_tokens))
    assert len(rows) <= batch.num_tokens / 0.75


def test_the_choice_falls_through_to_a_kernel_that_takes_all_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []

    def fake(name: str, *fields: str) -> Kernel:
        return Kernel(lambda query, *_, **__: (chosen.append(name), query)[1], takes=frozenset(fields))

    for name, fields in {"plain": (), "sdpa": ("dropout", "softcap")}.items():
        monkeypatch.setitem(dispatch.KERNELS, name, fake(name, *fields))
    layout = lay_out(collate(random_groups(0)))
    query = torch.zeros(len(layout.all_tokens.restore), 4, 8, requires_grad=True)
    for spec in (AttentionSpec(1.0), AttentionSpec(1.0, dropout=0.1), AttentionSpec(1.0, softcap=9.0)):
        attend(query, query, query, layout, spec)
    assert chosen == ["plain", "sdpa", "sdpa"]


@pytest.mark.parametrize("kernel", ["auto", "plain", "sdpa"])
@pytest.mark.parametrize("grad", [True, False])
def test_values_may_have_another_dimension_than_queries(kernel: str, grad: bool) -> None:
    """In latent attention; texts are long enough for every kernel of a CPU."""
    layout = lay_out(collate([TokenGroup(np.arange(200), [np.arange(100), np.arange(60)], ())]), kernel)
    query, key, value = (torch.randn(360, count, size) for count, size in ((4, 24), (2, 24), (2, 16)))
    for spec in (AttentionSpec(0.2), AttentionSpec(0.2, sinks=torch.ones(4)), AttentionSpec(0.2, chunk=7)):
        with torch.set_grad_enabled(grad):
            found = attend(query, key, value, layout, spec)
        wanted = reference_attention(*(part.transpose(0, 1) for part in (query, key, value)), layout.labels, spec)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", ["plain", "sdpa"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("prefix", fast_first([30, 0, 1]))
def test_groups_of_many_responses_are_split_in_inference(kernel: str, window: int | None, prefix: int) -> None:
    """Best-of-16 among groups of all shapes: the same attention with less than half of the mask cells."""
    draw = np.random.default_rng(prefix)
    tails = [draw.integers(7, 264, draw.integers(1, 40)).astype(np.int32) for _ in range(16)]
    wide = TokenGroup(draw.integers(7, 264, prefix).astype(np.int32), tails, ())
    batch = collate([*random_groups(0), wide, *random_groups(1), wide])
    layout = lay_out(batch, kernel)
    assert layout.by_response is not None
    cells = [
        sum(bucket.query_rows.numel() * bucket.key_tokens.shape[1] for bucket in queries.buckets)
        for queries in (layout.by_response, layout.all_tokens)
    ]
    assert cells[0] < cells[1] / 2
    inputs = [torch.randn(1, count, batch.num_tokens, 16) for count in (4, 2, 2)]
    with torch.no_grad():
        found, _ = packed_attention(torch.nn.Identity(), *inputs, None, packed=layout, sliding_window=window)
    wanted = reference_attention(*(part[0] for part in inputs), layout.labels, AttentionSpec(0.25, window))
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=0)


def test_pairs_are_not_split() -> None:
    tokens = np.arange(7, 47, dtype=np.int32)
    assert lay_out(collate([TokenGroup(tokens, [tokens[:20], tokens[:15]], ())] * 4)).by_response is None
