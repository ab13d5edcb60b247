"""The estimate: memory, the micro-batch that fits, time, and what to change when it does not fit.

What an epoch asks for is worked out here: micro-batches as the trainer plans them, operations, bytes between processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.batching.plan import PackingConfig, epoch_order, split_steps
from rm_gallery.data.token_cache.arrays import GroupSizes
from rm_gallery.planning.config import EstimateConfig, check_positions, device_of, layout_of
from rm_gallery.planning.devices import Device
from rm_gallery.planning.lengths import Lengths, assumed_lengths, read_lengths, tokenizer_in
from rm_gallery.planning.memory import Layout, MemoryUse, Pack, activations, step_memory
from rm_gallery.planning.model_shape import ModelShape, load_shape

_MOST_TOKENS = 2**22  # of a micro-batch
_ROUND_TO = 256  # tokens


@dataclass(frozen=True)
class Timing:
    """Of one epoch."""

    flops: float
    """Operations over all processes, those of recomputed activations included."""
    compute_seconds: float
    communication_seconds: float
    """When links run at their published rate; it is hidden behind the computation as far as it is shorter."""

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.communication_seconds)


@dataclass(frozen=True)
class Estimate:
    """All that is known of a run before it starts."""

    config: EstimateConfig
    shape: ModelShape
    device: Device
    lengths: Lengths
    layout: Layout
    workload: Workload
    micro_batch: int
    """Tokens of the fullest micro-batch under the configuration."""
    memory: MemoryUse
    activations: dict[bool, float]
    """Bytes of that micro-batch without (False) and with (True) gradient checkpointing."""
    fitting: int
    """Tokens of the largest micro-batch that fits, in steps of 256; 0 when none does."""
    longest_group: int
    """Tokens that a micro-batch must at least have room for."""
    timing: Timing
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.device.memory


def estimate(config: EstimateConfig) -> Estimate:
    """Estimate a run from its configuration; reads the model's configuration and a sample of the data, no weights."""
    shape = load_shape(config.model.partial_pretrain, trust_remote_code=config.model.trust_remote_code)
    return _estimate(config, shape, _lengths(config), device_of(config))


def _lengths(config: EstimateConfig) -> Lengths:
    if not config.data.train_files:
        prompt, response = config.assumed_tokens
        return assumed_lengths(
            prompt=prompt,
            response=response,
            num_pairs=config.pairs or 100_000,
            max_length=config.data.max_length,
        )
    tokenizer = config.tokenizer or tokenizer_in(config.model.partial_pretrain)
    found = read_lengths(config.data, tokenizer_folder=tokenizer, chars_per_token=config.chars_per_token)
    return found if config.pairs is None else replace(found, num_pairs=config.pairs)


def _estimate(config: EstimateConfig, shape: ModelShape, lengths: Lengths, device: Device) -> Estimate:
    budget = config.data.budget
    workload = plan_workload(
        lengths, config.data, token_budget=budget, num_processes=config.n_gpus, padded=shape.padded
    )
    # Without data nobody knows how full a step is, so that its micro-batches may be, and may be several.
    one_micro_batch = bool(config.data.train_files) and workload.micro_batches_per_step <= 1
    layout = layout_of(config, shape, device, one_micro_batch=one_micro_batch)

    def memory(tokens: int) -> MemoryUse:
        return memory_at(config, shape, lengths, device, tokens=tokens, one_micro_batch=one_micro_batch)

    micro_batch = min(budget, workload.largest_pack) if config.data.train_files else budget
    pack = fullest_pack(micro_batch, lengths, padded=shape.padded)
    sizes = lengths.sizes
    longest = sizes.longest_text * sizes.num_responses if shape.padded else sizes.tokens
    flops = flops_per_token(shape, sizes, checkpointing=layout.checkpointing) * workload.tokens
    rate = config.n_gpus * device.flops(config.model.fsdp_config.model_dtype) * config.mfu * workload.balance
    timing = Timing(flops, flops / rate, _communication(config, shape, layout, workload, device))
    notes = [check_positions(config, shape)]
    if int(longest.max()) > budget:
        notes.append(
            f"the longest group has {int(longest.max())} tokens, but a micro-batch has room for {budget}: training "
            "cuts it into pieces, each with the prompt, and a pair that is too long for one gets a micro-batch of its "
            f"own, which these figures leave out; set data.max_tokens_per_micro_batch={int(longest.max())} to avoid it"
        )
    return Estimate(
        config=config,
        shape=shape,
        device=device,
        lengths=lengths,
        layout=layout,
        workload=workload,
        micro_batch=micro_batch,
        memory=memory(micro_batch),
        activations={
            with_it: activations(shape, pack, layout.width, checkpointing=with_it) for with_it in (False, True)
        },
        fitting=largest_that_fits(lambda tokens: memory(tokens).total <= device.memory),
        longest_group=int(longest.max()),
        timing=timing,
        notes=tuple(note for note in notes if note),
    )


def memory_at(
    config: EstimateConfig, shape: ModelShape, lengths: Lengths, device: Device, *, tokens: int, one_micro_batch: bool
) -> MemoryUse:
    """Memory of each process when its fullest micro-batch has so many tokens."""
    pack = fullest_pack(tokens, lengths, padded=shape.padded)
    overhead = device.overhead + (device.overhead_many if config.n_gpus > 1 else 0)
    layout = layout_of(config, shape, device, one_micro_batch=one_micro_batch)
    return step_memory(shape, layout, pack, overhead=overhead)


def largest_that_fits(fits: Callable[[int], bool]) -> int:
    """Most tokens, a multiple of 256, for which `fits` holds; more tokens never take less memory. 0 if none do."""
    low, high = 0, _MOST_TOKENS // _ROUND_TO
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle * _ROUND_TO):
            low = middle
        else:
            high = middle - 1
    return low * _ROUND_TO


def _communication(
    config: EstimateConfig, shape: ModelShape, layout: Layout, workload: Workload, device: Device
) -> float:
    """Seconds of an epoch that sending takes; what spans machines goes at the network's pace."""
    inside, across = bytes_per_step(shape, layout, workload.micro_batches_per_step)
    shards = layout.shards
    link = device.link
    # Data enter a machine once, through the ports of all its GPUs, however many of them take it.
    machine = min(link, device.network * config.gpus_per_node)
    machines = min(link, device.network * max(1.0, config.gpus_per_node / shards))
    seconds = inside / (link if shards <= config.gpus_per_node else machine)
    seconds += across / (link if config.n_gpus <= config.gpus_per_node else machines)
    return seconds * workload.steps


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
