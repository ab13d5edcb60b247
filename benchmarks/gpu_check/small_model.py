"""A small reward model, preference data, and short training runs built from the trainer's parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.batching.loader import StepBatches, load_steps
from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.data.batching.plan import PackingConfig, Plan
from rm_gallery.data.token_cache.arrays import TokenData, make_chunk, with_starts
from rm_gallery.data.tokenization.token_group import Origin, TokenGroup
from rm_gallery.distributed.collectives import HostGroup
from rm_gallery.distributed.process_group import World, seed_everything
from rm_gallery.modeling.config import FsdpConfig, ModelConfig
from rm_gallery.modeling.parallel.apply import apply, offload_optimizer
from rm_gallery.modeling.parallel.strategy import Strategy
from rm_gallery.modeling.reward_model import load_reward_model
from rm_gallery.objectives import OBJECTIVES
from rm_gallery.schema import Comparison
from rm_gallery.training.checkpoint import Progress, RunTensors, Start
from rm_gallery.training.config import OptimConfig
from rm_gallery.training.optim import build_optimizer, build_schedule
from rm_gallery.training.trainer import Intervals, Saver, Trainer

VOCABULARY = 264
PAIRS_PER_STEP = 8


@dataclass(frozen=True)
class Size:
    """The model's sizes, and the lengths of the texts."""

    hidden: int = 256
    layers: int = 3
    heads: int = 4
    longest: int = 300
    """Tokens of a prompt, and of a response."""
    steps: int = 30
    lr: float = 3e-4


SMALL = Size()
ON_CPU = Size(hidden=64, layers=2, heads=2, longest=24, lr=1e-3)
TINY = Size(hidden=32, layers=2, heads=4, longest=12, steps=3)
SIZES = {"small": SMALL, "on_cpu": ON_CPU, "tiny": TINY}


def model_config(dtype: str, **settings: Any) -> ModelConfig:
    """settings: keys of ModelConfig and FsdpConfig."""
    fsdp = {name: settings.pop(name) for name in FsdpConfig.__dataclass_fields__ if name in settings}
    return ModelConfig(fsdp_config=FsdpConfig(model_dtype=dtype, **fsdp), **settings)


def make_folder(folder: Path, size: Size, seed: int = 0) -> Path:
    """A random Qwen2 reward model with a tokenizer of bytes, as a model folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForSequenceClassification

    names = ["<|pad|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=size.hidden, intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=max(1, size.heads // 2),
        max_position_embeddings=16384, pad_token_id=0, eos_token_id=1, bos_token_id=None, num_labels=1,
        initializer_range=0.03,
    )  # fmt: skip
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_data(size: Size) -> TokenData:
    """Pairs for every step; the tokens of better responses are lower, so that the loss falls."""
    draw = np.random.default_rng(0)
    groups = []
    for _ in range(PAIRS_PER_STEP * size.steps):
        prefix = draw.integers(7, VOCABULARY, draw.integers(0, size.longest))
        better, worse = (
            draw.integers(low, low + 160, draw.integers(1, size.longest)).astype(np.int32) for low in (7, 104)
        )
        groups.append(TokenGroup(prefix.astype(np.int32), [better, worse], [Comparison(0, 1)]))
    chunk = make_chunk((group, Origin("pairs", number)) for number, group in enumerate(groups))
    return TokenData(with_starts(chunk.arrays), files=chunk.files, sources=chunk.sources, style="text")


class NoCheckpoints:
    """Saves nothing."""

    latest: Path | None = None

    def save(self, progress: Progress, sums: Mapping[str, float], *, is_last: bool = False) -> None: ...

    def has_failed(self) -> bool:
        return False

    def wait(self) -> None: ...

    def describe_last_good(self, progress: Progress) -> str:
        return "no checkpoint was written"


@dataclass
class Curve:
    """Takes the losses of a run."""

    losses: list[float] = field(default_factory=list)
    on_step: Callable[[int], None] = lambda step: None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.losses.append(metrics["train/loss"])
        self.on_step(step)


@dataclass
class Setup:
    """A run that is ready to train."""

    trainer: Trainer
    tensors: RunTensors
    curve: Curve
    data: TokenData


def set_up(
    folder: Path, size: Size, device: torch.device, model: ModelConfig, *, strategy: Strategy = "none",
    prefetch: bool = True, curve: Curve | None = None, save_freq: int = 0,
    checkpoints: Callable[[Setup], tuple[Start, Saver]] | None = None,
) -> Setup:  # fmt: skip
    """The parts of a run, in the order of training/setup.py.

    prefetch: False copies batches to the device before the step, waiting for each copy.
    """
    seed_everything(1)
    world = World(0, 1, device)
    reward_model = load_reward_model(str(folder), dropout=model.dropout).model
    weights = apply(reward_model, model, world, strategy=strategy)
    data, curve = make_data(size), curve or Curve()
    config = PackingConfig(train_batch_size=PAIRS_PER_STEP, max_tokens_per_micro_batch=6 * size.longest)
    plan = Plan(data.sizes, config, Packer(6 * size.longest), seed=1)
    optimizer = build_optimizer(weights.named_parameters(), OptimConfig(lr=size.lr))
    offload_optimizer(optimizer, model.fsdp_config, device)
    tensors, ranks = RunTensors(reward_model, weights, optimizer), HostGroup(world)

    def trainer(start: Start, saver: Saver) -> Trainer:
        steps = load_steps(data, plan, start_step=start.progress.step)
        return Trainer(
            model=reward_model, weights=weights, objective=OBJECTIVES["bradley_terry"], optimizer=optimizer,
            schedule=build_schedule(OptimConfig(lr_scheduler="constant"), size.steps), clip_grad=1.0,
            steps=steps if prefetch else _copied(steps, device), total_steps=size.steps,
            intervals=Intervals(1, 0, save_freq), max_bad_steps=3, validate=None, checkpoints=saver, sink=curve,
            ranks=ranks, start=start,
        )  # fmt: skip

    found = Setup(trainer(Start(), NoCheckpoints()), tensors, curve, data)
    if checkpoints is not None:
        found.trainer = trainer(*checkpoints(found))
    return found


def losses(folder: Path, size: Size, device: torch.device, model: ModelConfig, **options: Any) -> list[float]:
    """The loss of each step of a run."""
    run = set_up(folder, size, device, model, **options)
    run.trainer.train()
    return run.curve.losses


def _copied(steps: Iterator[StepBatches], device: torch.device) -> Iterator[StepBatches]:
    for step in steps:
        yield replace(step, batches=[_copy(batch, device) for batch in step.batches])


def _copy(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """The batch on the device, from pageable memory."""
    tensors: dict[str, Any] = {
        name: value.to(device) for name, value in vars(batch).items() if isinstance(value, Tensor)
    }
    return replace(batch, **tensors)


def worst(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest difference of two curves; infinite if one is shorter or not finite."""
    if len(found) != len(expected) or not np.isfinite([*found, *expected]).all():
        return float("inf")
    return max((abs(a - b) for a, b in zip(found, expected, strict=True)), default=float("inf"))
