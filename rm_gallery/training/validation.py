"""Validation: one pass over the validation data, without changing model, optimizer or random state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rm_gallery.data.batching.bin_packing import Packer, attention_length
from rm_gallery.data.batching.packed_batch import PackedBatch, collate
from rm_gallery.data.batching.prompt_sharing import plan_step
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.tokenization.token_group import TokenGroup
from rm_gallery.distributed.collectives import all_gather
from rm_gallery.distributed.process_group import rank, world_size
from rm_gallery.modeling.forward import weighted_sum
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.objectives import Objective
from rm_gallery.objectives.metrics import Sums
from rm_gallery.training.benchmark_sets import BenchmarkSet, hash_texts

BY_SOURCE = ("loss", "accuracy")
"""Metrics that each source of several has too."""
_GROUPS_AT_ONCE = 4096  # groups packed at a time, so that memory does not grow with the data


def validate(
    model: RewardModel, data: TokenData, objective: Objective, *, token_budget: int, share_prompts: bool = True,
    device: torch.device | None = None, before_pack: Callable[[], None] = lambda: None,
    attribute_weights: Sequence[float] = (), benchmark: BenchmarkSet | None = None,
) -> dict[str, float]:  # fmt: skip
    """val/loss, val/accuracy and mean rewards over all comparisons; with several sources, loss and accuracy of each.

    val/reward_mean and val/reward_std are over the distinct responses; see `_length_correlation` for another.
    Collective: each rank computes its share and gets all metrics.
    token_budget: tokens of a micro-batch; share_prompts: compute pairs of the same prompt together. The metrics depend
    on neither (float64 sums of float32 rewards).
    device: where the model computes, if its weights are offloaded. before_pack: called before each micro-batch; an
    exception from it aborts the validation. attribute_weights: of several outputs in the reward of a response.
    benchmark: what the data are, if they are one; the objective then gets one reward for each response.
    """
    device = device or next(model.parameters()).device
    has_rewards = objective.reads == "last_token"
    packer = packer_for(model, token_budget=token_budget, world_size=world_size())
    by_source = {number: Sums() for number in range(len(data.sources))}
    lengths = Sums()
    texts, scored = [], []
    with model.inference():
        for source, groups in load_packs(data, packer, share_prompts=share_prompts):
            before_pack()
            batch = collate(groups).to(device)
            rewards = model(batch)
            if not has_rewards:
                by_source[source].add(objective(rewards, batch)[1])
                continue
            scored.append(weighted_sum(rewards, attribute_weights))
            by_source[source].add(objective(rewards if benchmark is None else scored[-1], batch)[1])
            texts += hash_texts(groups)
            lengths.add(_length_sums(scored[-1], batch))
    total = Sums()
    for sums in by_source.values():
        total.merge(sums)
    metrics = objective.means(total.read(), "val")
    if len(by_source) > 1:
        for number, sums in by_source.items():
            found = objective.means(sums.read(), "val")
            name = by_source_names(data)[number]
            kinds = BY_SOURCE if benchmark is None else ("accuracy",)
            metrics.update({f"val/{kind}/{name}": found[f"val/{kind}"] for kind in kinds if f"val/{kind}" in found})
    if not has_rewards:
        return metrics
    rewards_of_rank = torch.cat(scored).cpu().numpy() if scored else np.zeros(0, np.float32)
    distinct, values = _distinct_rewards(np.array(texts, np.uint64), rewards_of_rank)
    if len(values) > 1:
        metrics |= {"val/reward_mean": float(values.mean()), "val/reward_std": float(values.std(ddof=1))}
    if benchmark is not None:
        metrics |= benchmark.metrics(distinct, values)
    return {**metrics, **_length_correlation(lengths.read())}


def by_source_names(data: TokenData) -> list[str]:
    """Name of each source in the metrics, in the order of their numbers; none for a single source."""
    return [name or "other" for name in data.sources] if len(data.sources) > 1 else []


def validate_sets(
    val: TokenData | None, sets: Mapping[str, tuple[TokenData, BenchmarkSet | None]],
    run: Callable[[TokenData, BenchmarkSet | None], dict[str, float]],
) -> dict[str, float]:  # fmt: skip
    """Metrics of the validation data as `val/accuracy`, and of each set as `val/NAME/accuracy`, with `val/NAME/n`.

    run: validates on one of them. Collective, as `validate`.
    """
    metrics = run(val, None) if val is not None else {}
    for name, (data, benchmark) in sets.items():
        found = {**run(data, benchmark), "val/n": float(data.num_comparisons)}
        metrics |= {f"val/{name}/{metric.removeprefix('val/')}": value for metric, value in found.items()}
    return metrics


def _length_sums(rewards: Tensor, batch: PackedBatch) -> dict[str, Tensor]:
    """Second moments of the differences of reward and of length over the comparisons. rewards: [R]."""
    lengths = torch.tensor(
        [n for tails in batch.tail_lengths for n in tails], dtype=torch.float64, device=rewards.device
    )
    reward, length = (each[batch.better] - each[batch.worse] for each in (rewards.double(), lengths))
    return {"rr": reward.square().sum(), "ll": length.square().sum(), "rl": (reward * length).sum()}


def _length_correlation(sums: Mapping[str, float]) -> dict[str, float]:
    """Correlation of the difference of the rewards of a pair with that of their lengths in tokens, in either order.

    With both orders of each pair the means are 0. {} where all are equally long, or have the same reward.
    """
    variance = sums.get("rr", 0.0) * sums.get("ll", 0.0)
    return {"val/length_correlation": sums["rl"] / math.sqrt(variance)} if variance else {}


def _distinct_rewards(texts: np.ndarray, rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct texts of all ranks, sorted, with a reward of each as float64.

    texts: [R] uint64 hashes of this rank's texts; rewards: [R] float32. A text may occur several times, on several
    ranks: in a group of every pair that it is part of. It counts once, so neither sharing nor ranks change the result.
    """
    texts, rewards = (np.concatenate(each) for each in zip(*all_gather((texts, rewards)), strict=True))
    distinct, first = np.unique(texts, return_index=True)
    return distinct, rewards[first].astype(np.float64)


def packer_for(model: RewardModel, *, token_budget: int, world_size: int) -> Packer:
    """The packer for this model: padded or not, and what attention costs at its width."""
    length = attention_length(model.network.config.hidden_size)
    return Packer(token_budget, world_size, padded=model.padded, attention_length=length)


def load_packs(data: TokenData, packer: Packer, *, share_prompts: bool) -> Iterator[tuple[int, list[TokenGroup]]]:
    """This rank's share of all groups in micro-batches, in any order. Every rank gets the same number, some empty.

    All groups of a micro-batch have the same source, whose number is yielded with it.
    """
    for source in range(len(data.sources)):
        members = np.flatnonzero(data.source_numbers == source)
        for start in range(0, len(members), _GROUPS_AT_ONCE):
            groups = members[start : start + _GROUPS_AT_ONCE]
            step = plan_step(data, groups, packer, share_prompts=share_prompts)
            for pack in step.packs[rank()]:
                yield source, step.load(data, pack)
