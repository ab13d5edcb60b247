"""The estimate: memory, the micro-batch that fits, time, and what to change when it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from rm_gallery.planning.config import EstimateConfig, check_positions, device_of, layout_of
from rm_gallery.planning.devices import Device
from rm_gallery.planning.lengths import Lengths, assumed_lengths, read_lengths, tokenizer_in
from rm_gallery.planning.memory import Layout, MemoryUse, activations, step_memory
from rm_gallery.planning.shapes import ModelShape, load_shape
from rm_gallery.planning.workload import Workload, bytes_per_step, flops_per_token, fullest_pack, plan_workload

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
