"""Workload: micro-batches as training plans them, operations as torch counts them, bytes by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from rm_gallery.data.batching.plan import PackingConfig
from rm_gallery.data.token_cache.arrays import GroupSizes
from rm_gallery.planning.estimate import bytes_per_step, flops_per_token, fullest_pack, plan_workload
from rm_gallery.planning.lengths import Lengths, assumed_lengths
from rm_gallery.planning.memory import Layout
from rm_gallery.planning.model_shape import load_shape
from tests.planning.models import batch_and_pack, model_and_shape


def _lengths(tokens: list[int], num_pairs: int | None = None) -> Lengths:
    sizes = np.array(tokens, np.int64)
    ones = np.ones(len(tokens), np.int64)
    return Lengths(GroupSizes(sizes, sizes * 6 // 10, ones * 2, ones), num_pairs or len(tokens), max(tokens), "")


def test_equal_pairs_fill_every_process_alike() -> None:
    lengths = assumed_lengths(prompt=100, response=200, num_pairs=2560, max_length=4096)
    found = plan_workload(
        lengths, PackingConfig(train_batch_size=256), token_budget=4000, num_processes=8, padded=False
    )
    assert found.tokens == 2560 * 500
    assert found.steps == 10
    assert found.micro_batches_per_step == 256 / 8 / 8
    assert found.largest_pack == 4000
    assert found.balance == 1


def test_fewer_pairs_than_processes_leave_some_waiting() -> None:
    config = PackingConfig(train_batch_size=6)
    found = plan_workload(_lengths([100] * 60), config, token_budget=4000, num_processes=8, padded=False)
    assert found.micro_batches_per_step == 1
    assert found.balance == 6 / 8


def test_a_small_sample_stands_for_a_large_step() -> None:
    lengths = _lengths([100, 300], num_pairs=1000)
    found = plan_workload(
        lengths, PackingConfig(train_batch_size=100), token_budget=1000, num_processes=2, padded=False
    )
    assert (found.steps, found.tokens) == (10, 200_000)
    assert found.micro_batches_per_step == 10


def test_an_encoder_pays_for_whole_texts() -> None:
    lengths = _lengths([100] * 64)
    found = plan_workload(lengths, PackingConfig(train_batch_size=64), token_budget=1200, num_processes=1, padded=True)
    assert found.tokens == 64 * 2 * 60
    assert found.largest_pack == 1200


def test_a_group_larger_than_the_budget_does_not_stop_the_plan() -> None:
    found = plan_workload(_lengths([5000, 10]), PackingConfig(), token_budget=1000, num_processes=1, padded=False)
    assert found.largest_pack == 1000


def test_the_fullest_pack_holds_the_longest_group() -> None:
    lengths = _lengths([100] * 99 + [1000])
    pack = fullest_pack(2000, lengths, padded=False)
    assert pack.tokens == 2000
    assert 2000 < pack.rows < 2000 / 0.75  # attention's buckets are at least three quarters full
    assert 1000**2 < pack.cells < 2000 * 1000
    assert fullest_pack(500, lengths, padded=False).cells == 500**2


def test_equal_groups_need_no_padding_and_encoders_pad_to_the_longest_text() -> None:
    pack = fullest_pack(2000, _lengths([500] * 4), padded=False)
    assert (pack.rows, pack.cells) == (2000, 2000 * 500)
    pack = fullest_pack(1200, _lengths([100, 500]), padded=True)
    assert (pack.rows, pack.cells) == (1200, 1200 * 300)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text", "bert", "modernbert"])
def test_operations_are_those_that_torch_counts(kind: str, tmp_path: Path) -> None:
    model, shape = model_and_shape(kind, tmp_path / "model", hidden_size=128, intermediate_size=512)
    batch, pack = batch_and_pack(shape, groups=4)
    with FlopCounterMode(display=False) as counter:
        model(batch).sum().backward()
    counted = sum(
        value for operation, value in counter.get_flop_counts()["Global"].items() if "attention" not in str(operation)
    )
    sizes = GroupSizes(*(np.array([value]) for value in (60, 40, 2, 1)))
    keys = 40 if shape.padded else 20
    seen = [min(keys, window or keys) for window in shape.windows]
    if not shape.padded:
        seen[-1] *= 2 / 60  # the last layer asks at reward tokens only
    attention = 12 * shape.num_heads * shape.head_dim * sum(seen) * pack.tokens
    expected = flops_per_token(shape, sizes, checkpointing=False) * pack.tokens - attention
    assert expected == pytest.approx(counted, rel=0.02)  # head and pooler see one token of a text
    if shape.padded:
        assert expected == pytest.approx(6 * shape.matrix_parameters * pack.tokens)
    else:
        assert expected < 0.7 * 6 * shape.matrix_parameters * pack.tokens


def test_checkpointing_computes_the_forward_pass_again() -> None:
    shape = load_shape("qwen2.5-0.5b")
    sizes = _lengths([1000]).sizes
    once = flops_per_token(shape, sizes, checkpointing=False)
    assert flops_per_token(shape, sizes, checkpointing=True) == pytest.approx(once * 4 / 3)


def test_bytes_of_each_strategy() -> None:
    shape = replace(load_shape("qwen2.5-0.5b"), parameters=1000)
    whole = Layout("ddp", 8, 1, 2, False, False, False, False)
    assert bytes_per_step(shape, whole, 4) == (0, 8 * 1000 * 7 / 8)
    assert bytes_per_step(shape, replace(whole, strategy="fsdp2", shards=8), 4) == (4 * 8 * 1000 * 7 / 8, 0)
    hybrid = bytes_per_step(shape, replace(whole, strategy="fsdp2", shards=2), 4)
    assert hybrid == (4 * 8 * 1000 / 2, 8 * 500 * 3 / 4)
    assert bytes_per_step(shape, replace(whole, strategy="none", num_processes=1), 4) == (0, 0)
