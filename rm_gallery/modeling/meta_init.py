"""Initializes a model on the meta device, and names the files that each rank reads its shard from.

Parameters have no memory on torch's meta device; buffers, which no file holds, are real. Used for sharded weights, so
that no rank ever holds the whole model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rm_gallery.errors import UserError, one_line
from rm_gallery.modeling.reward_model import (
    LoadedModel,
    RewardModel,
    has_head,
    lost_parts,
    network_class_arguments,
    quiet_transformers,
)

_FLOATS = ("F64", "F32", "F16", "BF16")


class NoOutline(Exception):
    """This model must be loaded whole; the message says why."""


@dataclass(frozen=True)
class WeightFiles:
    """Where the tensors of a network lie."""

    tensors: Mapping[str, tuple[Path, str]]
    """Name in the network -> file, name in the file."""
    new: Mapping[str, Tensor]
    """Name in the network -> value, of the few tensors that no file holds: reward head, pooler."""

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Give every tensor of `state` (names of the network) its value; of a DTensor only the part that is here.

        Raises UserError for a file that cannot be read.
        """
        by_file: dict[Path, list[str]] = {}
        for name in state:
            if name in self.new:
                part = rows_here(state[name])
                local_part(state[name]).copy_(self.new[name][part] if part else self.new[name])
            else:
                by_file.setdefault(self.tensors[name][0], []).append(name)
        for file, names in by_file.items():
            try:
                with safe_open(file, framework="pt") as source:
                    for name in names:
                        _copy_rows(state[name], source.get_slice(self.tensors[name][1]))
            except Exception as error:
                raise UserError(f"{file}: the weights cannot be read ({one_line(error)})") from error


def rows_here(tensor: Tensor) -> slice | None:
    """Rows of the whole tensor that this process holds, or None for all.

    FSDP cuts the first axis as torch.chunk does: equal parts, the last ones short or empty.
    """
    if not isinstance(tensor, DTensor):
        return None
    axes = [axis for axis, placement in enumerate(tensor.placements) if placement.is_shard()]
    if not axes:
        return None
    assert len(axes) == 1 and tensor.placements[axes[0]].is_shard(0), f"cut along the first axis: {tensor.placements}"
    parts, place = tensor.device_mesh.size(axes[0]), tensor.device_mesh.get_local_rank(axes[0])
    rows = -(-tensor.shape[0] // parts)
    start = min(place * rows, tensor.shape[0])
    return slice(start, min(start + rows, tensor.shape[0]))


def local_part(tensor: Tensor) -> Tensor:
    """The memory of this process behind a tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _copy_rows(tensor: Tensor, source: Any) -> None:
    local = local_part(tensor)
    if local.numel():
        local.copy_(source[rows_here(tensor) or slice(None)] if local.ndim else source[...])


def outline_reward_model(
    path: str, *, seed: int, key: str = "model.partial_pretrain", trust_remote_code: bool = False, dropout: float = 0.0
) -> tuple[LoadedModel, WeightFiles]:
    """As `load_reward_model`, without reading the weights; new parts get the values that it gives them under `seed`.

    Raises NoOutline where the library has to load the model itself (weights that are not safetensors, names or shapes
    that it would convert, code of the folder's own), and UserError as `load_reward_model` does.
    """
    from transformers import AutoModelForSequenceClassification

    config, extra = network_class_arguments(path, key=key, trust_remote_code=trust_remote_code, dropout=dropout)
    if getattr(config, "quantization_config", None):
        raise NoOutline("its weights are quantized")
    if trust_remote_code and getattr(config, "auto_map", None):
        raise NoOutline("its code comes with the folder")
    files = _weight_files(path)
    try:
        with quiet_transformers(), _parameters_without_memory():
            network = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32, **extra)
    except Exception as error:
        raise UserError(f"{key}={path}: the model cannot be loaded ({one_line(error)})") from error
    found, missing = _find_tensors(network, files)
    lost = lost_parts(missing)
    if lost:
        raise NoOutline(f"no file holds {lost[0]} under that name")
    new = _initialise(network, missing, seed)
    return LoadedModel(RewardModel(network), has_head(missing), tuple(missing)), WeightFiles(found, new)


def _weight_files(path: str) -> list[Path]:
    """The safetensors files that the library would read: one, or those that an index names."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            with quiet_transformers():
                folder = Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
        except Exception as error:
            raise NoOutline(f"its files cannot be fetched by themselves ({one_line(error)})") from error
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if all((folder / name).is_file() for name in names):
            return [folder / name for name in names]
    raise NoOutline("its weights are not in model.safetensors, nor in the files of an index")


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Parameters of modules that are made inside lose their memory at once; buffers keep theirs."""
    plain = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        plain(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def _find_tensors(network: Any, files: list[Path]) -> tuple[dict[str, tuple[Path, str]], list[str]]:
    """Where each tensor of the network lies, and the names of those that lie nowhere.

    A causal language model has the names of our backbone, and a head more; a bare backbone lacks the prefix.
    Raises NoOutline for another shape or type.
    """
    places: dict[str, tuple[Path, str]] = {}
    shapes: dict[str, list[int]] = {}
    types: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as source:
                for name in source.keys():  # noqa: SIM118 (not a dict)
                    part = source.get_slice(name)
                    places[name], shapes[name], types[name] = (file, name), part.get_shape(), part.get_dtype()
        except Exception as error:
            raise NoOutline(f"{file} cannot be read ({one_line(error)})") from error
    prefix = f"{network.base_model_prefix}."
    found, missing = {}, []
    for name, tensor in network.state_dict().items():
        there = name if name in places else name.removeprefix(prefix)
        if there not in places:
            missing.append(name)
        elif list(tensor.shape) != shapes[there]:
            raise NoOutline(f"{there} has the shape {shapes[there]}, not {list(tensor.shape)}")
        elif types[there] not in _FLOATS and tensor.is_floating_point():
            raise NoOutline(f"{there} is of type {types[there]}")
        else:
            found[name] = places[there]
    return found, sorted(missing)


@torch.no_grad()
def _initialise(network: Any, names: list[str], seed: int) -> dict[str, Tensor]:
    """Values of the named tensors as the library draws them when it loads a folder without them.

    It draws for them alone, in the order of its modules: with the same seed each process gets the same values, and
    they are those of one process that loads the whole model.
    """
    if not names:
        return {}
    for name, parameter in network.named_parameters():
        if name in names:
            _put(network, name, torch.empty(parameter.shape, dtype=parameter.dtype))
        else:
            parameter._is_hf_initialized = True
    for module in network.modules():
        module._is_hf_initialized = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.initialize_weights()
    values = {name: network.get_parameter_or_buffer(name).detach() for name in names}
    for name, value in values.items():
        if isinstance(network.get_parameter_or_buffer(name), nn.Parameter):
            _put(network, name, value.to("meta"))
    return values


def _put(network: nn.Module, name: str, value: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    setattr(network.get_submodule(owner), last, nn.Parameter(value))
