"""Workload: micro-batches as training plans them, operations as torch counts them, bytes by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.batching.plan import PackingConfig, Plan
from rm_gallery.data.config import DataConfig, Side
from rm_gallery.data.token_cache.arrays import GroupSizes, TokenData
from rm_gallery.data.tokenization.token_group import Origin, TokenGroup
from rm_gallery.planning.estimate import Workload, bytes_per_step, flops_per_token, fullest_pack, plan_workload
from rm_gallery.planning.memory import Layout
from rm_gallery.planning.model_shape import load_shape
from rm_gallery.planning.sample import Sample, assumed_sample, read_sample
from rm_gallery.schema import Comparison
from rm_gallery.training.data_setup import load_side
from tests.planning.models import batch_and_pack, model_and_shape
from tests.small import write_pairs


def _sample(tokens: list[int], num_pairs: int | None = None) -> Sample:
    """A pair of each length: a fifth is the prompt, and both responses are equally long."""
    groups = [
        (TokenGroup(_ids(each // 5), [_ids(each * 2 // 5)] * 2, (Comparison(0, 1),)), Origin(prompt_hash=number))
        for number, each in enumerate(tokens)
    ]
    return Sample(TokenData.from_groups(groups), num_pairs or len(tokens), max(tokens), "")


def _ids(count: int) -> np.ndarray:
    return np.zeros(count, np.int32)


def _plan(sample: Sample, *, budget: int, processes: int = 1, padded: bool = False, batch: int = 256) -> Workload:
    return plan_workload(sample, PackingConfig(train_batch_size=batch), Packer(budget, processes, padded), seed=0)


def test_equal_pairs_fill_every_process_alike() -> None:
    sample = assumed_sample(prompt=100, response=200, num_pairs=2560, max_length=4096)
    found = _plan(sample, budget=4000, processes=8)
    assert found.tokens == 2560 * 500
    assert found.steps == 10
    assert found.micro_batches_per_step == 256 / 8 / 8
    assert found.largest_pack == 4000
    assert found.balance == 1


def test_fewer_pairs_than_processes_leave_some_waiting() -> None:
    found = _plan(_sample([100] * 60), budget=4000, processes=8, batch=6)
    assert found.micro_batches_per_step == 1
    assert found.balance == 6 / 8


def test_a_small_sample_stands_for_a_large_step() -> None:
    found = _plan(_sample([100, 300], num_pairs=1000), budget=1000, processes=2, batch=100)
    assert (found.steps, found.tokens) == (10, 200_000)
    assert found.micro_batches_per_step == 10


def test_an_encoder_pays_for_whole_texts() -> None:
    found = _plan(_sample([100] * 64), budget=1200, padded=True, batch=64)
    assert found.tokens == 64 * 2 * 60
    assert found.largest_pack == 1200


def test_a_pair_larger_than_the_budget_has_a_micro_batch_of_its_own() -> None:
    assert _plan(_sample([5000, 10]), budget=1000).largest_pack == 5000


@pytest.mark.parametrize("share", [True, False])
def test_the_plan_is_that_of_training(share: bool, tmp_path: Path, tokenizer_folder: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "ask " * 30 + str(row // 8), "chosen": "a" * row, "rejected": "b"} for row in range(1, 201)]
    path = write_pairs(tmp_path / "train.parquet", rows)
    config = DataConfig(
        train_files=str(path), train_batch_size=50, max_tokens_per_micro_batch=900, keep_prompts_together=True,
        share_prompts=share, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    packer = Packer(900, 2)
    sample = read_sample(config, tokenizer_folder=str(tokenizer_folder), chars_per_token=4)
    found = plan_workload(sample, config, packer, seed=3)
    data = load_side(Side("data.train_files"), config, tokenizer).data
    plan = Plan(data.sizes, config, packer, seed=3, prompts=data.prompt_hashes)
    steps = [plan.step(data, groups) for groups in plan.epoch_steps(0)[:-1]]
    assert found.units.tokens.tolist() == [unit.tokens for step in steps for unit in step.units]
    assert found.micro_batches_per_step == np.mean([len(step.packs[0]) for step in steps])
    if share:
        assert found.tokens < 0.8 * sample.data.sizes.tokens.sum()


def test_the_fullest_pack_holds_the_longest_group() -> None:
    work = _plan(_sample([100] * 99 + [1000]), budget=2000)
    pack = fullest_pack(2000, work, padded=False)
    assert pack.tokens == 2000
    assert 2000 < pack.rows < 2000 / 0.75  # attention's buckets are at least three quarters full
    assert 1000**2 < pack.cells < 2000 * 1000
    assert fullest_pack(500, work, padded=False).cells == 500**2


def test_equal_groups_need_no_padding_and_encoders_pad_to_the_longest_text() -> None:
    pack = fullest_pack(2000, _plan(_sample([500] * 4), budget=2000), padded=False)
    assert (pack.rows, pack.cells) == (2000, 2000 * 500)
    pack = fullest_pack(1200, _plan(_sample([100, 500]), budget=1200, padded=True), padded=True)
    assert (pack.rows, pack.cells) == (1200, 1200 * 300)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text", "bert", "modernbert"])
@pytest.mark.slow
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
    sizes = _sample([1000]).data.sizes
    once = flops_per_token(shape, sizes, checkpointing=False)
    assert flops_per_token(shape, sizes, checkpointing=True) == pytest.approx(once * 4 / 3)


def test_bytes_of_each_strategy() -> None:
    shape = replace(load_shape("qwen2.5-0.5b"), parameters=1000, trained_parameters=1000)
    whole = Layout("ddp", 8, 1, 2, False, False, False, False)
    assert bytes_per_step(shape, whole, 4) == (0, 8 * 1000 * 7 / 8)
    assert bytes_per_step(shape, replace(whole, strategy="fsdp2", shards=8), 4) == (4 * 8 * 1000 * 7 / 8, 0)
    hybrid = bytes_per_step(shape, replace(whole, strategy="fsdp2", shards=2), 4)
    assert hybrid == (4 * 8 * 1000 / 2, 8 * 500 * 3 / 4)
    assert bytes_per_step(shape, replace(whole, strategy="none", num_processes=1), 4) == (0, 0)
