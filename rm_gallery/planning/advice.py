"""What to change when a run does not fit: every setting alone, and the fewest that are enough together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice
from typing import Any

from rm_gallery.planning.config import EstimateConfig, layout_of
from rm_gallery.planning.estimate import Estimate, largest_that_fits, memory_at
from rm_gallery.planning.memory import Layout, MemoryUse

_MOST_GPUS = 4096
_MOST_TOGETHER = 4


@dataclass(frozen=True)
class Step:
    """One change and the memory of each process after it."""

    change: str
    """As it is written on the command line."""
    memory: MemoryUse
    fits: bool


@dataclass(frozen=True)
class Advice:
    alone: tuple[Step, ...]
    """Changes that save memory, each by itself, the least costly first."""
    together: tuple[tuple[Step, ...], ...]
    """When none of them is enough: up to two ways with the fewest that are, each change on top of those before."""


Change = Callable[["_Search", EstimateConfig], tuple[str, EstimateConfig] | None]
"""The setting in words and the configuration with it; None when it is in use already or cannot help."""


def advise(found: Estimate) -> Advice:
    """Look for changes under which the same micro-batch, or a smaller one that is large enough, fits."""
    search = _Search(found)
    alone = [steps[0] for change in _CHANGES if (steps := search.steps([change]))]
    alone = [step for step in alone if step.memory.total < found.memory.total]
    if any(step.fits for step in alone):
        return Advice(tuple(alone), ())
    for count in range(2, _MOST_TOGETHER + 1):
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
            tokens = min(found.micro_batch, config.data.budget)
        # With other settings a step may be cut otherwise, so its gradients count in full.
        return memory_at(config, found.shape, found.lengths, found.device, tokens=tokens, one_micro_batch=False)

    def layout(self, config: EstimateConfig) -> Layout:
        return layout_of(config, self.found.shape, self.found.device, one_micro_batch=False)

    def fits(self, config: EstimateConfig, tokens: int | None = None) -> bool:
        return self.memory(config, tokens).total <= self.found.device.memory

    def steps(self, chosen: Sequence[Change]) -> list[Step]:
        """The changes one on top of the other; empty when one of them cannot be made."""
        config, steps = self.found.config, []
        for change in chosen:
            made = change(self, config)
            if made is None:
                return []
            text, config = made
            steps.append(Step(text, self.memory(config), self.fits(config)))
        return steps


def _set_model(text: str, **values: Any) -> Change:
    """A key of `model` or of its `fsdp_config`, unless it has that value already."""

    def change(search: _Search, config: EstimateConfig) -> tuple[str, EstimateConfig] | None:
        inner = values.keys() <= vars(config.model.fsdp_config).keys()
        owner: Any = config.model.fsdp_config if inner else config.model
        if all(getattr(owner, name) == value for name, value in values.items()):
            return None
        owner = replace(owner, **values)
        return text, replace(config, model=replace(config.model, fsdp_config=owner) if inner else owner)

    return change


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
    """The fewest, doubling, under which it fits."""
    number = config.n_gpus * 2
    while number <= _MOST_GPUS and config.gpu != "cpu":
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
    _set_model("model.fsdp_config.model_dtype=bf16", model_dtype="bf16"),
    _shard,
    _set_model("model.fsdp_config.fsdp_size=-1", fsdp_size=-1),
    _set_model("model.fsdp_config.optimizer_offload=true", optimizer_offload=True),
    _offload,
    _more_gpus,
    _smaller_micro_batch,
)
