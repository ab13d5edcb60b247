"""The configuration of an estimate: that of a training run, plus the hardware and the assumptions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from rm_gallery.config import load
from rm_gallery.data.config import data_problems
from rm_gallery.errors import Problem
from rm_gallery.modeling.config import DTYPE_BYTES, with_dtype
from rm_gallery.modeling.parallel.strategy import choose_strategy, training_state_bytes
from rm_gallery.planning.devices import GIB, USABLE, Device, device, has_bf16
from rm_gallery.planning.memory import Layout
from rm_gallery.planning.model_shape import ModelShape
from rm_gallery.training.config import TrainConfig, model_problems, normalize, optim_problems
from rm_gallery.training.objective_config import data_of

_ALIASES = {"model": "model.partial_pretrain", "data": "data.train_files"}
# An estimate needs no weights and no data files, and accepts known shapes as a model.
_IGNORED = ("model.partial_pretrain", "data.train_files", "data.val_files")


@dataclass(frozen=True)
class EstimateConfig(TrainConfig):
    """The sections of a training run, plus the hardware and the assumptions."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # type: ignore[dict-item]

    n_gpus: Annotated[int, Ge(1)] = 1
    """World size: one process per GPU, over all machines."""
    gpu: Literal[
        "b200",
        "h200",
        "h100",
        "a100-80",
        "a100-40",
        "mi300x",
        "l40s",
        "a6000",
        "4090",
        "3090",
        "l4",
        "a10g",
        "t4",
        "cpu",
    ] = "h100"
    """Kind of GPU; `cpu` divides this machine among the processes."""
    gpus_per_node: Annotated[int, Ge(1)] = 8
    """GPUs per machine."""
    gpu_memory_gib: Annotated[float, Gt(0)] | None = None
    """Usable memory per GPU, instead of the table's."""
    mfu: Annotated[float, Gt(0), Le(1)] = 0.4
    """Assumed model FLOPs utilization: fraction of the published dense FLOP/s that training reaches."""
    pairs: Annotated[int, Ge(1)] | None = None
    """Pairs per epoch; by default those of the data, or 100,000 without data."""
    prompt_tokens: Annotated[int, Ge(0)] | None = None
    """Without data: tokens per prompt; 300, or less if `data.max_length` is small."""
    response_tokens: Annotated[int, Ge(1)] | None = None
    """Without data: tokens per response; 350, or the remainder of `data.max_length`."""
    tokenizer: str = ""
    """Folder of the tokenizer for the data; by default the model's folder, if it holds one."""
    chars_per_token: Annotated[float, Gt(0)] = 4.0
    """Without a tokenizer: characters per token."""

    @property
    def assumed_tokens(self) -> tuple[int, int]:
        """Tokens per prompt and per response, without data."""
        most = self.data.max_length
        prompt = self.prompt_tokens
        if prompt is None:
            prompt = max(0, min(300, most * 300 // 650, most - (self.response_tokens or 1)))
        return prompt, self.response_tokens or max(1, min(350, most - prompt))


def load_estimate_config(file: str | None, overrides: Sequence[str]) -> EstimateConfig:
    """Read a training configuration with the keys of the estimate; `model=X` and `data=X` are aliases.

    Raises UserError that lists all problems, one a line.
    """
    config = load(
        EstimateConfig, file, overrides, aliases=_ALIASES, prepare=_normalize, check=_problems, ignore=_IGNORED
    )
    data = data_of(config.objective, config.model, config.data)
    return replace(config, data=data, model=with_dtype(config.model, has_bf16=has_bf16(config.gpu)))


def _normalize(values: dict[str, Any]) -> Iterator[Problem]:
    if isinstance(values.get("gpu"), str | int):
        values["gpu"] = str(values["gpu"]).lower()  # YAML reads 4090 as a number
    return normalize(values)


def _problems(config: EstimateConfig) -> Iterator[Problem]:
    if not config.model.partial_pretrain:
        text = "model is not set; use a folder with config.json, a configuration file, or a known shape"
        yield Problem("model", text)
    if config.objective.name == "sft":
        text = "objective.name=sft: the estimate has neither the output layer nor its logits; remove it to estimate a"
        yield Problem(
            "objective.name", f"{text} reward model of the same type, which takes somewhat less memory and time"
        )
    yield from model_problems(config.model)
    yield from data_problems(config.data)
    yield from optim_problems(config.optim)
    prompt, response = config.assumed_tokens
    if not config.data.train_files and prompt + response > config.data.max_length:
        yield Problem(
            "prompt_tokens",
            f"prompt_tokens={prompt} with response_tokens={response}: together more than "
            f"data.max_length={config.data.max_length}",
        )


def layout_of(config: EstimateConfig, shape: ModelShape, device: Device, *, one_micro_batch: bool) -> Layout:
    """How the model is sharded and where its state lives: the choices that training makes."""
    fsdp = config.model.fsdp_config
    on_gpu = config.gpu != "cpu"
    offload = on_gpu and fsdp.offloads_weights
    dtype_bytes, has_masters = DTYPE_BYTES[fsdp.model_dtype], fsdp.master_weights == "fp32"
    strategy = choose_strategy(
        config.model.strategy if config.model.quantization is None else "ddp",
        world_size=config.n_gpus,
        memory=device.memory / USABLE,
        state_bytes=training_state_bytes(
            shape.parameters,
            dtype_bytes,
            shape.trained_parameters,
            optimizer=config.optim.name,
            num_matrix=shape.matrix_parameters,
            has_masters=has_masters,
            has_ema=config.trainer.ema_decay is not None,
        ),
        offload=fsdp.offloads_weights,
        fsdp_size=fsdp.fsdp_size,
        on_gpu=on_gpu,
    )
    group = fsdp.fsdp_size if 0 < fsdp.fsdp_size <= config.n_gpus else config.n_gpus
    return Layout(
        strategy=strategy,
        num_processes=config.n_gpus,
        shards=group if strategy in ("fsdp", "fsdp2") else 1,
        width=dtype_bytes,
        # The selective mode is counted as no checkpointing: an upper bound.
        checkpointing=config.model.enable_gradient_checkpointing and config.model.checkpointing_mode == "full",
        offload=offload and strategy in ("fsdp", "fsdp2"),
        offload_optimizer=on_gpu and fsdp.optimizer_offload and not offload,
        one_micro_batch=one_micro_batch,
        optimizer=config.optim.name,
        has_masters=has_masters,
        has_ema=config.trainer.ema_decay is not None,
    )


def device_of(config: EstimateConfig) -> Device:
    """The device of each process, with `gpu_memory_gib` if it is set."""
    found = device(config.gpu, num_processes=config.n_gpus, dtype=config.model.fsdp_config.model_dtype)
    return found if config.gpu_memory_gib is None else replace(found, memory=config.gpu_memory_gib * GIB)


def check_positions(config: EstimateConfig, shape: ModelShape) -> str | None:
    """A note if texts may be longer than the model has positions for, else None."""
    if shape.max_positions is None or config.data.max_length <= shape.max_positions:
        return None
    return (
        f"data.max_length={config.data.max_length}, but the model has positions for {shape.max_positions} tokens; "
        f"set data.max_length={shape.max_positions}"
    )


def check_lora(config: EstimateConfig) -> str | None:
    """A note if LoRA is added to some of the linear layers only, else None."""
    if not config.model.lora.rank or not isinstance(config.model.lora.target_modules, list):
        return None
    return (
        "model.lora.target_modules: activations are counted as if all linear layers had LoRA, an upper bound; layers "
        "without it do not save their input"
    )


def check_bf16(config: EstimateConfig, device: Device) -> str | None:
    """A note if the run computes in bfloat16 on a device without units for it, else None."""
    if device.has_bf16 or config.model.fsdp_config.model_dtype != "bf16":
        return None
    return (
        f"{device.name} has no bf16 units and emulates them: the time is that of float32, a lower bound; "
        "set model.fsdp_config.model_dtype=fp32"
    )
