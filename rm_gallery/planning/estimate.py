"""The estimate: peak memory, the largest micro-batch that fits, and the time of an epoch.

Micro-batches are those of training's own plan on a sample of the data; see sample.py, memory.py and devices.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from rm_gallery.data.batching.bin_packing import Packer, attention_length
from rm_gallery.data.batching.plan import Mixture, PackingConfig, Plan
from rm_gallery.data.batching.prompt_sharing import sizes_of
from rm_gallery.data.token_cache.arrays import GroupSizes
from rm_gallery.planning.config import EstimateConfig, check_bf16, check_lora, check_positions, device_of, layout_of
from rm_gallery.planning.devices import Device
from rm_gallery.planning.memory import Layout, MemoryUse, Pack, activations, step_memory
from rm_gallery.planning.model_shape import ModelShape, load_shape
from rm_gallery.planning.sample import Sample, assumed_sample, read_sample, tokenizer_in

_MAX_TOKENS = 2**22  # of a micro-batch
_ROUND_TO = 256  # tokens


@dataclass(frozen=True)
class Timing:
    """Time of one epoch."""

    flops: float
    """FLOPs over all processes, those of recomputed activations included."""
    compute_seconds: float
    communication_seconds: float
    """At the published bandwidth of the links; overlapped with the computation as far as it is shorter."""

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.communication_seconds)


@dataclass(frozen=True)
class Estimate:
    """The estimate of a run."""

    config: EstimateConfig
    shape: ModelShape
    device: Device
    sample: Sample
    layout: Layout
    workload: Workload
    micro_batch: int
    """Tokens of the fullest micro-batch under the configuration."""
    memory: MemoryUse
    activations: dict[bool, float]
    """Bytes of that micro-batch without (False) and with (True) activation checkpointing."""
    fitting: int
    """Tokens of the largest micro-batch that fits, in steps of 256; 0 when none does."""
    longest_group: int
    """Tokens that a micro-batch must hold for no group to be split."""
    timing: Timing
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the run fits with the margin of the device."""
        return self.memory.total <= self.device.limit

    @property
    def run_seconds(self) -> float:
        """Seconds of the whole run: `total_training_steps`, or else `total_epochs`."""
        trainer = self.config.trainer
        steps = trainer.total_training_steps
        epochs = trainer.total_epochs if steps is None else steps / self.workload.steps
        return self.timing.seconds * epochs


def estimate(config: EstimateConfig) -> Estimate:
    """Estimate a run from its configuration. Reads the model's configuration and a sample of the data, no weights."""
    model = config.model
    shape = load_shape(
        model.partial_pretrain,
        trust_remote_code=model.trust_remote_code,
        packing=model.packing,
        freeze=model.freeze,
        lora=model.lora,
        quantization=model.quantization,
    )
    sample, device, budget = _sample(config), device_of(config), config.data.budget
    packer = Packer(budget, config.n_gpus, padded=shape.padded, attention_length=attention_length(shape.hidden))
    work = plan_workload(sample, config.data, packer, seed=config.trainer.seed)
    # Without data the plan is of equal pairs, which may fill a micro-batch less than real ones.
    micro_batch = work.largest_pack if config.data.train_files else budget
    one_micro_batch = bool(config.data.train_files) and work.micro_batches_per_step <= 1
    layout = layout_of(config, shape, device, one_micro_batch=one_micro_batch)

    def memory(tokens: int) -> MemoryUse:
        return memory_at(config, shape, work, device, tokens=tokens, one_micro_batch=one_micro_batch)

    pack = fullest_pack(micro_batch, work, padded=shape.padded)
    flops = flops_per_token(shape, work.units, checkpointing=layout.checkpointing) * work.tokens
    rate = config.n_gpus * device.flops(config.model.fsdp_config.model_dtype) * config.mfu * work.balance
    longest = int(packer.tokens(sample.data.sizes).max())
    notes = [check_positions(config, shape), check_bf16(config, device), check_lora(config)]
    if longest > budget:
        notes.append(
            f"the longest group has {longest} tokens, but a micro-batch holds {budget}: training splits it into "
            "pieces, each with the prompt, and a pair that is too long gets a separate micro-batch; "
            f"set data.max_tokens_per_micro_batch={longest} to avoid it"
        )
    return Estimate(
        config=config,
        shape=shape,
        device=device,
        sample=sample,
        layout=layout,
        workload=work,
        micro_batch=micro_batch,
        memory=memory(micro_batch),
        activations={
            with_it: activations(shape, pack, layout.width, checkpointing=with_it) for with_it in (False, True)
        },
        fitting=largest_that_fits(lambda tokens: memory(tokens).total <= device.limit),
        longest_group=longest,
        timing=Timing(flops, flops / rate, _communication(config, shape, layout, work, device)),
        notes=tuple(note for note in notes if note),
    )


def _sample(config: EstimateConfig) -> Sample:
    if not config.data.train_files:
        prompt, response = config.assumed_tokens
        return assumed_sample(
            prompt=prompt,
            response=response,
            num_pairs=config.pairs or 100_000,
            max_length=config.data.max_length,
        )
    tokenizer = config.tokenizer or tokenizer_in(config.model.partial_pretrain)
    found = read_sample(config.data, tokenizer_folder=tokenizer, chars_per_token=config.chars_per_token)
    return found if config.pairs is None else replace(found, num_pairs=config.pairs)


def memory_at(
    config: EstimateConfig, shape: ModelShape, work: Workload, device: Device, *, tokens: int, one_micro_batch: bool
) -> MemoryUse:
    """Peak memory of each process when its fullest micro-batch has `tokens` tokens."""
    pack = fullest_pack(tokens, work, padded=shape.padded)
    overhead = device.overhead + (device.overhead_many if config.n_gpus > 1 else 0)
    layout = layout_of(config, shape, device, one_micro_batch=one_micro_batch)
    return step_memory(shape, layout, pack, overhead=overhead)


def largest_that_fits(fits: Callable[[int], bool]) -> int:
    """The largest multiple of 256 tokens for which `fits` is true, by bisection; 0 if there is none.

    More tokens never take less memory.
    """
    low, high = 0, _MAX_TOKENS // _ROUND_TO
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle * _ROUND_TO):
            low = middle
        else:
            high = middle - 1
    return low * _ROUND_TO


def _communication(config: EstimateConfig, shape: ModelShape, layout: Layout, work: Workload, device: Device) -> float:
    """Seconds of communication in an epoch; between machines at the bandwidth of the network."""
    inside, across = bytes_per_step(shape, layout, work.micro_batches_per_step)
    shards = layout.shards
    link = device.link
    # Data enter a machine once, through the ports of all its GPUs, however many of them receive it.
    machine = min(link, device.network * config.gpus_per_node)
    machines = min(link, device.network * max(1.0, config.gpus_per_node / shards))
    seconds = inside / (link if shards <= config.gpus_per_node else machine)
    seconds += across / (link if config.n_gpus <= config.gpus_per_node else machines)
    return seconds * work.steps


_MAX_STEPS = 32  # of the sample that are planned
_USUAL_FILL = 0.9  # share of a bucket's places that hold tokens, when lengths differ


@dataclass(frozen=True)
class Workload:
    """One epoch, scaled up from the sample. Tokens are those that the model computes: shared prompts once, padding
    included."""

    num_pairs: int
    tokens: float
    steps: float
    micro_batches_per_step: float
    """On each process."""
    largest_pack: int
    """Tokens of the fullest micro-batch."""
    balance: float
    """Mean tokens of a micro-batch over processes, as a share of the fullest: the others wait for that one."""
    units: GroupSizes
    """What is computed together in the planned steps: groups, pieces of a group, groups with a shared prompt."""
    longest_unit: int
    """Tokens; a group of the sample that no planned step holds may be the longest."""


def plan_workload(sample: Sample, config: PackingConfig, packer: Packer, *, seed: int) -> Workload:
    """Plan the first steps of the sample as training would, and scale up.

    Example: a sample of 4,000 pairs from 400,000, 256 pairs per step. 15 full steps of the sample are planned; if they
    compute 1.9 million tokens in 60 micro-batches, the epoch has 400,000 / 3,840 times as many of both.
    """
    sizes, mixture = sample.data.sizes, sample.mixture
    groups = slice(None) if mixture is None else mixture.groups(seed=seed, epoch=0)
    batch_size = min(config.train_batch_size, sample.num_pairs)
    repeats = -(-batch_size // int(sizes.num_comparisons[groups].sum()))
    if repeats > 1:  # the sample is smaller than a step: each group represents several, which share nothing
        entry = np.zeros(len(sizes), np.int32) if mixture is None else mixture.entry
        weights = [1.0] if mixture is None else mixture.weights
        mixture = Mixture(entry, [weight * repeats for weight in weights])
        config = replace(config, share_prompts=False)
    config = replace(config, train_batch_size=batch_size, drop_last=False)
    plan = Plan(sizes, config, packer, seed=seed, mixture=mixture, prompts=sample.data.prompt_hashes)
    steps = plan.epoch_steps(0)
    full = steps[: max(1, min(_MAX_STEPS, len(steps) - 1))]  # the last one may hold fewer pairs
    planned = [plan.step(sample.data, groups) for groups in full]
    waited = computed = micro_batches = largest = 0
    for step in planned:
        sizes = sizes_of(step.units)
        tokens = np.array([packer.pack_tokens(packs, sizes) for packs in step.packs])  # [ranks, micro-batches]
        waited += int(tokens.max(axis=0).sum()) * packer.world_size
        computed += int(tokens.sum())
        largest = max(largest, int(tokens.max()))
        micro_batches += len(step.packs[0])
    units = sizes_of([unit for step in planned for unit in step.units])
    return Workload(
        num_pairs=sample.num_pairs,
        tokens=computed / sum(step.num_comparisons for step in planned) * sample.num_pairs,
        steps=sample.num_pairs / batch_size,
        micro_batches_per_step=micro_batches / len(planned),
        largest_pack=largest,
        balance=computed / waited,
        units=units,
        longest_unit=max(sample.longest_group, int(units.tokens.max())),
    )


def fullest_pack(tokens: int, work: Workload, *, padded: bool) -> Pack:
    """A micro-batch of `tokens` tokens that holds the longest unit; the rest are units of the usual length.

    The usual length is that of a random token's unit: units of 100 and 300 tokens give (100^2 + 300^2) / 400 = 250.
    """
    each = work.units.longest_text if padded else work.units.tokens
    longest = min(tokens, int(each.max()) if padded else work.longest_unit)
    usual = min(longest, float((each**2).sum() / each.sum()))
    if padded:  # padded to the longest, texts of similar length together
        return Pack(tokens, tokens, tokens * longest)
    fill = 1.0 if (each == each[0]).all() else _USUAL_FILL
    rest = tokens - longest
    return Pack(tokens, longest + rest / fill, longest**2 + rest * usual / fill**2)


def flops_per_token(shape: ModelShape, sizes: GroupSizes, *, checkpointing: bool) -> float:
    """FLOPs of the forward and backward pass for one token.

    6 per weight of a matrix (Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1), and 12 per
    layer, query width and key that a token attends to (Chowdhery et al. 2022, "PaLM", appendix B): half of its text on
    average, or its window. Of a mixture of experts those of one token count. There is no output matrix over the
    vocabulary, and the last of a decoder's own layers computes keys and values of all tokens but everything else at
    reward tokens only. Activation checkpointing recomputes the forward pass: 8 and 16.

    Example: 7 billion weights in matrices and 1,000 tokens take 6 * 7e9 * 1000 = 42 TFLOPs, 56 with checkpointing.
    """
    text = float((sizes.longest_text * sizes.tokens).sum() / sizes.tokens.sum())
    seen = text if shape.padded else text / 2
    keys = sum(min(seen, window or seen) for window in shape.windows)
    forward: float = 2 * shape.active_parameters + 4 * shape.num_heads * shape.head_dim * keys
    if shape.own_layers:  # the last layer has queries at reward tokens only
        query_width = shape.num_heads * shape.head_dim
        skipped: float = 2 * shape.hidden * (2 * query_width + 3 * shape.intermediate)
        skipped += 4 * query_width * min(seen, shape.windows[-1] or seen)
        forward -= skipped * (1 - float(sizes.num_responses.sum() / sizes.tokens.sum()))
    trained = 1 - shape.frozen_layers / shape.num_layers  # the rest has no backward pass
    backward = 1 if shape.adapter_rank else 2  # with LoRA no gradients of the matrices, and its own are small
    return forward * (1 + (backward + (1 if checkpointing else 0)) * trained)


def bytes_per_step(shape: ModelShape, layout: Layout, micro_batches: float) -> tuple[float, float]:
    """Bytes that each process sends in a step inside its sharding group, and between the groups.

    FSDP all-gathers the weights for the forward and the backward pass of each micro-batch and reduce-scatters float32
    gradients (Rajbhandari et al. 2020, section 7.2.2). Replicas all-reduce gradients once a step: twice their size.
    """
    shards = layout.shards
    replicas = layout.num_processes // shards
    sent = 2 * layout.width * shape.parameters + 4 * shape.trained_parameters
    inside = micro_batches * sent * (shards - 1) / shards
    across = 2 * 4 * shape.trained_parameters / shards * (replicas - 1) / replicas
    return inside, across
