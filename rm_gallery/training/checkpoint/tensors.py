"""The tensors of a run: float32 weights and optimizer state, sharded or not, for torch.distributed.checkpoint.

A checkpoint holds them under the model's own names, `model.NAME` and `optimizer.NAME.exp_avg`, whatever the strategy:
another number of processes or another strategy reads the same files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from rm_gallery.modeling.parallel import MasterWeights
from rm_gallery.modeling.reward_model import RewardModel

_BYTES_AT_ONCE = 1 << 30  # that `read_weights` holds beside what it gives back


class RunTensors:
    """The weights that the optimizer updates, and its state."""

    def __init__(self, model: RewardModel, weights: MasterWeights, optimizer: torch.optim.Optimizer) -> None:
        self.weights, self.optimizer = weights, optimizer
        self._module = _trained_module(model, weights)

    def read(self) -> dict[str, Any]:
        """All tensors by name, as they lie on this rank; not copies. Every rank calls it at the same place."""
        quiet()
        state: dict[str, Any] = {"model": get_model_state_dict(self._module)}
        if self.optimizer.state:
            state["optimizer"] = get_optimizer_state_dict(self._module, self.optimizer)["state"]
        return state

    def load(self, folder: Path, group: dist.ProcessGroup | None) -> None:
        """Take all tensors from a checkpoint's `training_state`. Every rank calls it at the same place.

        The optimizer's settings (rates, decay) stay those of the configuration. Raises whatever
        torch.distributed.checkpoint does when names or shapes are not those of this model.
        """
        quiet()
        saved = _saved_names(folder)
        state: dict[str, Any] = {"model": get_model_state_dict(self._module)}
        # Gives every parameter a state, which takes a step at rate 0; the weights come afterwards.
        optimizer: dict[str, Any] = get_optimizer_state_dict(self._module, self.optimizer)
        found = optimizer["state"]
        # A parameter that has had no gradient has no state. In a run where every step was bad, none has.
        kept = {name: found[name] for name in found if f"optimizer.{name}.exp_avg" in saved}
        if kept:
            state["optimizer"] = kept
        dcp.load(state, checkpoint_id=folder, process_group=group)
        set_model_state_dict(self._module, state["model"])
        set_optimizer_state_dict(
            self._module,
            self.optimizer,
            {"state": state.get("optimizer", {}), "param_groups": optimizer["param_groups"]},
            options=StateDictOptions(strict=False),
        )
        if not kept:
            self.optimizer.state.clear()
        self.weights.publish()


def read_weights(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Whole weights from a checkpoint's `training_state`, under the names of the library's model, on the host.

    One process does this alone, from files that all ranks have written: no GPU ever holds the whole model.
    """
    weights: dict[str, Tensor] = {}
    quiet()
    reader = dcp.FileSystemReader(folder)
    entries: dict[str, Any] = reader.read_metadata().state_dict_metadata
    for names in _portions({name: entry for name, entry in entries.items() if name.startswith("model.")}):
        part = {name: torch.empty(entries[name].size, dtype=entries[name].properties.dtype) for name in names}
        dcp.load(part, storage_reader=reader, no_dist=True)
        for name, value in part.items():
            library_name = name.removeprefix("model.").removeprefix("network.")
            weights[library_name] = value.to(dtype) if value.is_floating_point() else value
    return weights


def _portions(entries: dict[str, Any]) -> Iterator[list[str]]:
    names: list[str] = []
    room = _BYTES_AT_ONCE
    for name, entry in entries.items():
        size = entry.size.numel() * entry.properties.dtype.itemsize
        if names and size > room:
            yield names
            names, room = [], _BYTES_AT_ONCE
        names.append(name)
        room -= size
    if names:
        yield names


def _saved_names(folder: Path) -> set[str]:
    return set(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)


def _trained_module(model: RewardModel, weights: MasterWeights) -> nn.Module:
    """A module whose parameters are the ones that the optimizer updates: the model, unless it computes with copies."""
    own = set(model.parameters())
    masters = dict(weights.named_parameters())
    if all(parameter in own for parameter in masters.values()):
        return model
    module = nn.Module()
    parameters = dict(model.named_parameters())
    for name, value in [*masters.items(), *model.state_dict(keep_vars=True).items()]:
        if name not in masters and name in parameters:
            continue
        *path, last = name.split(".")
        place = module
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        if name in masters:
            place.register_parameter(last, masters[name])
        elif not hasattr(place, last):
            place.register_buffer(last, value)
    return module


def quiet() -> None:
    """Switch off what the library warns about single processes; for good, since other threads save meanwhile."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
