"""Batches: the example of `PackedBatch`, to the letter, and what holds for any groups."""

from __future__ import annotations

import torch

from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.tokenization.token_group import split_prefix
from rm_gallery.schema import Comparison
from tests.small import random_groups, whole_texts


def test_collate_lays_out_the_example_of_its_docstring() -> None:
    a, b, c, d, e, f, g, h = range(8)
    first = split_prefix([[a, b, c, d], [a, b, e]], [Comparison(0, 1, 0.5)])
    second = split_prefix([[f], [g, h]], [Comparison(1, 0)])
    batch = collate([first, second])
    assert batch.input_ids.tolist() == [a, b, c, d, e, f, g, h]
    assert batch.positions.tolist() == [0, 1, 2, 3, 2, 0, 0, 1]
    assert batch.group.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert batch.response.tolist() == [-1, -1, 0, 0, 1, 2, 3, 3]
    assert batch.reward_index.tolist() == [3, 4, 5, 7]
    assert (batch.better.tolist(), batch.worse.tolist()) == ([0, 3], [1, 2])
    assert batch.weight.tolist() == [0.5, 1.0]
    assert (batch.group_lengths, batch.tail_lengths) == ((5, 3), ((2, 1), (1, 2)))


def test_margins_and_soft_labels_are_carried_with_nan_for_none() -> None:
    known = Comparison(0, 1, margin=-2.5, p_better=0.25)
    batch = collate([split_prefix([[1], [2], [3]], [known, Comparison(1, 2)])])
    assert batch.margin.dtype == batch.p_better.dtype == torch.float32
    assert (batch.margin[0].item(), batch.p_better[0].item()) == (-2.5, 0.25)
    assert batch.margin[1].isnan() and batch.p_better[1].isnan()


def test_each_reward_is_read_at_the_last_token_of_its_whole_text() -> None:
    for seed in range(20):
        groups = random_groups(seed)
        batch = collate(groups)
        texts = whole_texts(groups)
        assert batch.input_ids[batch.reward_index].tolist() == [text[-1] for text in texts]
        assert (batch.positions[batch.reward_index] + 1).tolist() == [len(text) for text in texts]


def test_no_groups_give_an_empty_batch() -> None:
    batch = collate([])
    assert batch.num_tokens == len(batch.reward_index) == len(batch.better) == len(batch.margin) == 0
    assert batch.input_ids.dtype == batch.group.dtype == torch.int64


def test_a_batch_on_its_device_is_not_copied() -> None:
    batch = collate(random_groups(0))
    assert batch.to(torch.device("cpu")) is batch
