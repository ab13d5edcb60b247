"""An estimate as text and as plain values for JSON, with changes that make a run fit.

First every change on its own; if none is enough, the smallest combinations that are.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, islice
from typing import Any

from rm_gallery.planning.config import EstimateConfig, layout_of
from rm_gallery.planning.devices import GIB
from rm_gallery.planning.estimate import Estimate, Workload, largest_that_fits, memory_at
from rm_gallery.planning.memory import Layout, MemoryUse

_MAX_GPUS = 4096
_MAX_COMBINED = 4


@dataclass(frozen=True)
class Step:
    """One change of the configuration, and the peak memory of each process with it."""

    change: str
    """As an override on the command line."""
    memory: MemoryUse
    fits: bool


@dataclass(frozen=True)
class Advice:
    alone: tuple[Step, ...]
    """Changes that reduce memory, each on its own, those that cost the least speed first."""
    together: tuple[tuple[Step, ...], ...]
    """If none of them is enough: up to two of the smallest combinations that are; changes are cumulative."""


Change = Callable[["_Search", EstimateConfig], tuple[str, EstimateConfig] | None]
"""The override and the configuration with it; None if it is set already or cannot help."""


def advise(found: Estimate) -> Advice:
    """Search for changes with which the micro-batch fits, or a smaller one that still holds the longest group."""
    search = _Search(found)
    alone = [steps[0] for change in _CHANGES if (steps := search.steps([change]))]
    alone = [step for step in alone if step.memory.total < found.memory.total]
    if any(step.fits for step in alone):
        return Advice(tuple(alone), ())
    for count in range(2, _MAX_COMBINED + 1):
        tried = (search.steps(chosen) for chosen in combinations(_CHANGES, count))
        enough = list(islice((tuple(steps) for steps in tried if steps and steps[-1].fits), 2))
        if enough:
            return Advice(tuple(alone), tuple(enough))
    return Advice(tuple(alone), ())


class _Search:
    def __init__(self, found: Estimate) -> None:
        self.found = found

    def memory(self, config: EstimateConfig, tokens: int | None = None) -> MemoryUse:
        found = self.found
        if tokens is None:
            tokens = min(found.micro_batch, max(config.data.budget, found.longest_group))
        # Other settings may change the number of micro-batches in a step, so gradients count in full.
        return memory_at(config, found.shape, found.workload, found.device, tokens=tokens, one_micro_batch=False)

    def layout(self, config: EstimateConfig) -> Layout:
        return layout_of(config, self.found.shape, self.found.device, one_micro_batch=False)

    def fits(self, config: EstimateConfig, tokens: int | None = None) -> bool:
        return self.memory(config, tokens).total <= self.found.device.limit

    def steps(self, chosen: Sequence[Change]) -> list[Step]:
        """The changes applied one after the other; empty if one of them does not apply."""
        config, steps = self.found.config, []
        for change in chosen:
            made = change(self, config)
            if made is None:
                return []
            text, config = made
            steps.append(Step(text, self.memory(config), self.fits(config)))
        return steps


def _set_model(text: str, **values: Any) -> Change:
    """Sets keys of `model` or of its `fsdp_config`, unless they have these values already."""

    def change(search: _Search, config: EstimateConfig) -> tuple[str, EstimateConfig] | None:
        inner = values.keys() <= vars(config.model.fsdp_config).keys()
        owner: Any = config.model.fsdp_config if inner else config.model
        if all(getattr(owner, name) == value for name, value in values.items()):
            return None
        owner = replace(owner, **values)
        return text, replace(config, model=replace(config.model, fsdp_config=owner) if inner else owner)

    return change


def _bf16(search: _Search, config: EstimateConfig) -> tuple[str, EstimateConfig] | None:
    if not search.found.device.has_bf16:
        return None
    return _set_model("model.fsdp_config.model_dtype=bf16", model_dtype="bf16")(search, config)


def _shard(search: _Search, config: EstimateConfig) -> tuple[str, EstimateConfig] | None:
    if search.layout(config).strategy != "ddp" or config.model.strategy in ("fsdp", "fsdp2"):
        return None
    return "model.strategy=fsdp2", replace(config, model=replace(config.model, strategy="fsdp2"))


def _offload(search: _Search, config: EstimateConfig) -> tuple[str, EstimateConfig] | None:
    fsdp = config.model.fsdp_config
    if config.gpu == "cpu" or search.layout(config).offload or (config.model.strategy == "ddp" and config.n_gpus > 1):
        return None
    model = replace(config.model, fsdp_config=replace(fsdp, cpu_offload=True))
    return "model.fsdp_config.cpu_offload=true", replace(config, model=model)


def _more_gpus(search: _Search, config: EstimateConfig) -> tuple[str, EstimateConfig] | None:
    """Double the number of GPUs until it fits."""
    number = config.n_gpus * 2
    while number <= _MAX_GPUS and config.gpu != "cpu":
        changed = replace(config, n_gpus=number)
        if search.fits(changed):
            return f"n_gpus={number}", changed
        number *= 2
    return None


def _smaller_micro_batch(search: _Search, config: EstimateConfig) -> tuple[str, EstimateConfig] | None:
    tokens = largest_that_fits(lambda tokens: search.fits(config, tokens))
    if not search.found.longest_group <= tokens < search.found.micro_batch:
        return None
    data = replace(config.data, max_tokens_per_micro_batch=tokens)
    return f"data.max_tokens_per_micro_batch={tokens}", replace(config, data=data)


_CHANGES: tuple[Change, ...] = (
    _set_model("model.enable_gradient_checkpointing=true", enable_gradient_checkpointing=True),
    _bf16,
    _shard,
    _set_model("model.fsdp_config.fsdp_size=-1", fsdp_size=-1),
    _set_model("model.fsdp_config.optimizer_offload=true", optimizer_offload=True),
    _offload,
    _more_gpus,
    _smaller_micro_batch,
)


_KINDS = {
    "weights": "weights, float32",
    "compute_copy": "weights, compute copy",
    "gradients": "gradients, float32",
    "optimizer": "optimizer state, float32",
    "average": "average (EMA), float32",
    "activations": "activations",
    "temporary": "largest temporary",
    "overhead": "framework overhead",
}


_WIDTH = 80  # columns
_NO_WAY = "use a smaller model or GPUs with more memory"


def as_text(found: Estimate, advice: Advice | None) -> str:
    """The report as text, the verdict first; memory in GiB."""
    parts = [(2, [_verdict(found, advice)]), (13, _what(found)), (2, _memory(found)), (13, _micro_batch(found))]
    parts.append((13, _time(found)))
    if advice is not None:
        parts.append((2, _changes(found, advice)))
    if found.notes:
        parts.append((6, [f"note: {note}" for note in found.notes]))
    return "\n\n".join("\n".join(_fold(line, indent) for line in lines) for indent, lines in parts)


def _fold(line: str, indent: int) -> str:
    """Wrapped between words; a path or a number is never broken."""
    return textwrap.fill(line, _WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _verdict(found: Estimate, advice: Advice | None) -> str:
    """`fits: 22.08 of 74.40 GiB on 1 x h100; 1 epoch takes about 9.0 min`, or what would make it fit."""
    config, device = found.config, found.device
    each = f" per {_owner(found)}" if config.n_gpus > 1 else ""
    used = f"{_gib(found.memory.total)} of {_gib(device.memory)} GiB{each} on {config.n_gpus} x {device.name}"
    if advice is None:
        return f"fits: {used}; {_run(found)} about {_duration(found.run_seconds)}"
    if found.memory.total <= device.memory:
        used += f", without a margin of {device.margin:.0%}"
    enough = [(step,) for step in advice.alone if step.fits] or advice.together
    ways = [" and ".join(step.change for step in steps) for steps in enough[:2]]
    return f"does not fit: {used}; " + (f"it would with {', or with '.join(ways)}" if ways else _NO_WAY)


def _run(found: Estimate) -> str:
    trainer = found.config.trainer
    if trainer.total_training_steps is not None:
        return f"{trainer.total_training_steps:,} steps take"
    return "1 epoch takes" if trainer.total_epochs == 1 else f"{trainer.total_epochs:,} epochs take"


def _what(found: Estimate) -> list[str]:
    shape, device, config = found.shape, found.device, found.config
    dtype = config.model.fsdp_config.model_dtype
    spread = {"none": "one process", "ddp": "ddp, replicated"}.get(
        found.layout.strategy, f"{found.layout.strategy}, sharded across {found.layout.shards} ranks"
    )
    outside = _count(shape.outer_parameters)
    layers = f"{shape.num_layers} layers of {_count(shape.layer_parameters)}"
    is_whole = shape.trained_parameters == shape.parameters
    lora, quantization = config.model.lora.rank, config.model.quantization
    how = f"model.lora.rank={lora}" if lora else f"model.freeze={config.model.freeze}"
    how += f", {_count(shape.quantized_parameters)} in {quantization}" if quantization else ""
    trained = "" if is_whole else f"; {_count(shape.trained_parameters)} trained ({how})"
    emulated = ", emulated" if dtype == "bf16" and not device.has_bf16 else ""
    rate = f"{device.flops(dtype) / 1e12:.3g} TFLOP/s in {dtype}{emulated} ({device.source})"
    checkpointing = "on" if found.layout.checkpointing else "off"
    per_pair = found.workload.tokens / found.workload.num_pairs
    once = "padding included" if shape.padded else "shared prompts once"
    return [
        f"model        {shape.name} ({shape.model_type}; {shape.source})",
        f"             {_count(shape.parameters)} parameters: {layers}, {outside} outside them{trained}",
        f"device       {config.n_gpus} x {device.name}: {_gib(device.memory)} GiB usable each",
        f"             {rate}",
        f"layout       model.strategy={config.model.strategy}: {spread}",
        f"             activation checkpointing {checkpointing}",
        f"data         {found.sample.how}",
        f"             {found.workload.num_pairs:,} {_items(found)} per epoch, {per_pair:,.0f} tokens each ({once})",
    ]


def _memory(found: Estimate) -> list[str]:
    use = found.memory
    lines = [f"peak memory per {_owner(found)} with {found.micro_batch:,} tokens in a micro-batch, GiB"]
    kinds = {name: text for name, text in _KINDS.items() if name != "average" or found.layout.has_ema}
    lines += [f"  {text:<26}{_gib(getattr(use, name)):>8}" for name, text in kinds.items()]
    if found.shape.trained_parameters < found.shape.parameters:
        frozen = found.config.model.quantization or found.config.model.fsdp_config.model_dtype
        lines[1] = f"  {f'weights, frozen in {frozen}':<26}{_gib(use.weights):>8}"
    if found.layout.sharded:
        lines[2] = f"  {'weights, gathered layers':<26}{_gib(use.compute_copy):>8}"
    room = found.device.memory - use.total
    left = f"{_gib(-room)} too much" if room < 0 else f"{_gib(room)} free{'' if found.fits else ', too little'}"
    lines.append(f"  {'total':<26}{_gib(use.total):>8}  of {_gib(found.device.memory)} usable: {left}")
    if use.host:
        host = use.host * min(found.config.n_gpus, found.config.gpus_per_node)
        lines.append(f"  {'offloaded':<26}{_gib(use.host):>8}  in host memory; {_gib(host)} per machine")
    lines.append(f"  peak: {use.moment}")
    if use.activations and not use.gradients and not found.layout.offload:
        lines[-1] += "; with one micro-batch per step, gradients are allocated as activations are freed"
    return lines


def _micro_batch(found: Estimate) -> list[str]:
    data = found.config.data
    setting = f"data.max_tokens_per_micro_batch={data.max_tokens_per_micro_batch}"
    if data.max_tokens_per_micro_batch is None:
        setting = (
            f"data.micro_batch_size_per_gpu={data.micro_batch_size_per_gpu} x 2 x data.max_length={data.max_length}"
        )
    largest = f"largest that fits: {found.fitting:,} tokens" if found.fitting else "none fits"
    if found.fitting >= 2 * data.budget:
        largest += f" (data.max_tokens_per_micro_batch={found.fitting})"
    without, with_it = (_gib(found.activations[checkpointing]) for checkpointing in (False, True))
    kept = f"{without} GiB, {with_it} with checkpointing"
    return [
        f"micro-batch  {data.budget:,} tokens at most",
        f"             ({setting})",
        f"             {largest}",
        f"             activations of {found.micro_batch:,} tokens: {kept}",
    ]


def _items(found: Estimate) -> str:
    """What a step has `data.train_batch_size` of."""
    return "rated responses" if found.config.data.attributes else "pairs"


def _time(found: Estimate) -> list[str]:
    timing, work, config = found.timing, found.workload, found.config
    rate = f"{config.mfu:.0%} MFU (assumed, mfu={config.mfu:g})"
    steps = f"{work.steps:,.0f} steps of {config.data.train_batch_size} {_items(found)}"
    each = f"{work.micro_batches_per_step:.3g} micro-batches per step on each {_owner(found)}"
    lines = [
        f"epoch        {_duration(timing.seconds)}: {timing.flops:.3g} FLOPs at {rate}",
        f"             {steps}",
        f"             {each}; load imbalance: {1 - work.balance:.0%}",
    ]
    more = "data.train_batch_size" if work.micro_batches_per_step <= 1 else "data.max_tokens_per_micro_batch"
    if timing.communication_seconds > timing.compute_seconds:
        lines.append(
            f"             limited by communication: computation alone takes {_duration(timing.compute_seconds)};\n"
            f"             a larger {more} communicates less often"
        )
    elif timing.communication_seconds:
        share = timing.communication_seconds / timing.compute_seconds
        lines.append(f"             communication, overlapped: {share:.0%} of that, at the published bandwidth")
    return lines


def _changes(found: Estimate, advice: Advice) -> list[str]:
    if not advice.alone and not advice.together:
        return [f"no setting helps; {_NO_WAY}"]
    lines = ["peak memory with one change"]
    lines += [_line(step) for step in advice.alone]
    for number, steps in enumerate(advice.together):
        lines.append("or:" if number else "no single change is enough; cumulative changes that are:")
        lines += [_line(step) for step in steps]
    if not advice.together and not any(step.fits for step in advice.alone):
        lines.append(f"no combination is enough; {_NO_WAY}")
    return lines


def _line(step: Step) -> str:
    host = f", {_gib(step.memory.host)} on host" if step.memory.host else ""
    line = f"  {step.change:<41}{_gib(step.memory.total):>8} GiB{host:<17}{'  fits' if step.fits else ''}"
    return line.rstrip()


def as_values(found: Estimate, advice: Advice | None) -> dict[str, Any]:
    """The same for `--json`: bytes, seconds, counts; `changes` is null when the run fits."""
    device = found.device
    changes = advice and {
        "alone": [_step(step) for step in advice.alone],
        "together": [[_step(step) for step in steps] for steps in advice.together],
    }
    return {
        "model": asdict(found.shape),
        "device": {"name": device.name, "source": device.source, "memory": device.memory},
        "layout": asdict(found.layout),
        "data": {"how": found.sample.how, "longest_group": found.longest_group, **_work(found.workload)},
        "memory": _use(found.memory),
        "activations": {"kept": found.activations[False], "checkpointed": found.activations[True]},
        "fits": found.fits,
        "margin": found.device.margin,
        "micro_batch": {"tokens": found.micro_batch, "largest_that_fits": found.fitting},
        "run": {"seconds": found.run_seconds},
        "epoch": {**asdict(found.timing), "seconds": found.timing.seconds, "mfu": found.config.mfu},
        "changes": changes,
        "notes": list(found.notes),
    }


def _work(work: Workload) -> dict[str, float]:
    names = ("num_pairs", "tokens", "steps", "micro_batches_per_step", "largest_pack", "balance")
    return {name: getattr(work, name) for name in names}


def _step(step: Step) -> dict[str, Any]:
    return {"change": step.change, "memory": _use(step.memory), "fits": step.fits}


def _use(memory: MemoryUse) -> dict[str, float]:
    return {**asdict(memory), "total": memory.total}


def _owner(found: Estimate) -> str:
    return "process" if found.config.gpu == "cpu" else "GPU"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}" if abs(size) < 100 * GIB else f"{size / GIB:,.1f}"


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"
