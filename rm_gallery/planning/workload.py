"""What an epoch asks for: micro-batches as the trainer plans them, operations, and bytes between processes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.batching.plan import PackingConfig, epoch_order, split_steps
from rm_gallery.data.token_cache.arrays import GroupSizes
from rm_gallery.planning.lengths import Lengths
from rm_gallery.planning.memory import Layout, Pack
from rm_gallery.planning.shapes import ModelShape

_MOST_STEPS = 32  # of the sample that are planned
_USUAL_FILL = 0.9  # of a bucket's places that hold tokens, when lengths differ


@dataclass(frozen=True)
class Workload:
    """One epoch, scaled up from the sample; tokens as the model computes them: prompts once, or padded."""

    num_pairs: int
    tokens: float
    steps: float
    micro_batches_per_step: float
    """On each process."""
    largest_pack: int
    """Tokens."""
    balance: float
    """Mean over processes of the tokens of a micro-batch, as a share of the fullest: all wait for that one."""


def plan_workload(
    lengths: Lengths, config: PackingConfig, *, token_budget: int, num_processes: int, padded: bool
) -> Workload:
    """Plan the sample's first steps as training would, and scale up.

    Groups that are larger than the budget count as long as the budget, though training cuts them into pieces, and
    what pairs of the same prompt share is not counted off: a sample does not say how many there are.
    """
    sizes = lengths.sizes
    if not padded:
        sizes = GroupSizes(
            np.minimum(sizes.tokens, token_budget), sizes.longest_text, sizes.num_responses, sizes.num_comparisons
        )
    packer = Packer(token_budget, num_processes, padded=padded)
    cost = packer.tokens(sizes)
    order = epoch_order(len(sizes), seed=0, epoch=0, shuffle=config.shuffle)
    batch_size = min(config.train_batch_size, lengths.num_pairs)
    # A sample may hold fewer pairs than a step: its groups stand for the others too.
    repeats = -(-batch_size // int(sizes.num_comparisons.sum()))
    order = np.tile(order, repeats)
    steps = split_steps(order, sizes.num_comparisons, batch_size=batch_size, drop_last=True) or [order]
    waited, computed, micro_batches, largest = 0, 0, 0, 0
    for groups in steps[:_MOST_STEPS]:
        of_step = sizes.of(groups)
        packs = packer.pack(of_step)
        tokens = np.array([packer.pack_tokens(each, of_step) for each in packs])  # [ranks, micro-batches]
        waited += int(tokens.max(axis=0).sum()) * num_processes
        computed += int(tokens.sum())
        largest = max(largest, int(tokens.max()))
        micro_batches += len(packs[0])
    per_pair = float(cost.sum() / sizes.num_comparisons.sum())
    return Workload(
        num_pairs=lengths.num_pairs,
        tokens=per_pair * lengths.num_pairs,
        steps=lengths.num_pairs / batch_size,
        micro_batches_per_step=micro_batches / len(steps[:_MOST_STEPS]),
        largest_pack=largest,
        balance=computed / waited,
    )


def fullest_pack(tokens: int, lengths: Lengths, *, padded: bool) -> Pack:
    """A micro-batch of so many tokens that holds the longest group; the rest are groups as a token meets them."""
    sizes = lengths.sizes
    each = sizes.longest_text if padded else sizes.tokens
    longest = min(tokens, int(sizes.longest_text.max()) if padded else lengths.longest_group)
    usual = min(longest, float((each**2).sum() / each.sum()))
    if padded:  # padded to the longest, all of like length
        return Pack(tokens, tokens, tokens * longest)
    fill = 1.0 if (each == each[0]).all() else _USUAL_FILL
    rest = tokens - longest
    return Pack(tokens, longest + rest / fill, longest**2 + rest * usual / fill**2)


def flops_per_token(shape: ModelShape, sizes: GroupSizes, *, checkpointing: bool) -> float:
    """Operations of forward and backward pass for one token.

    6 for each weight in a matrix (Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1), and 12
    for each layer, query width and key that a token sees (Chowdhery et al. 2022, "PaLM", appendix B), where it sees
    half of its text on average, or its window. The vocabulary's output matrix is not there, and a decoder's last layer
    has keys and values of all tokens but the rest at reward tokens only. Checkpointing computes the forward pass
    again: 8 and 16.
    """
    text = float((sizes.longest_text * sizes.tokens).sum() / sizes.tokens.sum())
    seen = text if shape.padded else text / 2
    keys = sum(min(seen, window or seen) for window in shape.windows)
    forward: float = 2 * shape.matrix_parameters + 4 * shape.num_heads * shape.head_dim * keys
    if not shape.padded:  # the last layer asks only at reward tokens
        query_width = shape.num_heads * shape.head_dim
        asked: float = 2 * shape.hidden * (2 * query_width + 3 * shape.intermediate)
        asked += 4 * query_width * min(seen, shape.windows[-1] or seen)
        forward -= asked * (1 - float(sizes.num_responses.sum() / sizes.tokens.sum()))
    return forward * (4 if checkpointing else 3)


def bytes_per_step(shape: ModelShape, layout: Layout, micro_batches: float) -> tuple[float, float]:
    """Bytes that each process sends in a step inside its sharding group, and between the groups.

    Sharding gathers the weights for the forward and the backward pass of each micro-batch and scatters float32
    gradients (Rajbhandari et al. 2020, section 7.2.2); copies of the model sum gradients once a step, twice their size.
    """
    shards = layout.shards
    copies = layout.num_processes // shards
    inside = micro_batches * (2 * layout.width + 4) * shape.parameters * (shards - 1) / shards
    across = 2 * 4 * shape.parameters / shards * (copies - 1) / copies
    return inside, across
