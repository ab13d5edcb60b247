"""The training state: tensors for torch.distributed.checkpoint (DCP), RNG states, and the progress of the run.

A checkpoint holds weights and optimizer state in float32, sharded or not, as `model.NAME` and `optimizer.NAME.exp_avg`.
The names do not depend on the strategy, so another world size or strategy reads the same files. RNG states (Python,
numpy, torch on the CPU and on this rank's GPU) are plain JSON values.
"""

from __future__ import annotations

import base64
import math
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from rm_gallery.modeling.parallel.master_weights import TrainedWeights
from rm_gallery.modeling.reward_model import RewardModel

_MODEL = "model.network."  # prefix of the names of the transformers model


class RunTensors:
    """The (master) weights that the optimizer updates, and the optimizer state."""

    def __init__(self, model: RewardModel, weights: TrainedWeights, optimizer: torch.optim.Optimizer) -> None:
        self.weights, self.optimizer = weights, optimizer
        self._module = _trained_module(model, weights)

    def read(self) -> dict[str, Any]:
        """Return all tensors of this rank by name, without copying them. A collective: every rank calls it."""
        quiet()
        state: dict[str, Any] = {"model": get_model_state_dict(self._module)}
        if self.optimizer.state:
            state["optimizer"] = get_optimizer_state_dict(self._module, self.optimizer)["state"]
        return state

    def load(self, folder: Path, group: dist.ProcessGroup | None) -> None:
        """Load all tensors from a `training_state` folder. A collective: every rank calls it.

        The optimizer's settings (learning rates, weight decay) stay those of the configuration. Raises the errors of
        torch.distributed.checkpoint when names or shapes do not match.
        """
        quiet()
        saved = _saved_names(folder)
        state: dict[str, Any] = {"model": get_model_state_dict(self._module)}
        # This initializes the optimizer state by a step with learning rate 0, so the weights are loaded afterwards.
        optimizer: dict[str, Any] = get_optimizer_state_dict(self._module, self.optimizer)
        found = optimizer["state"]
        # Parameters without a gradient so far have no state; after skipped steps only, none has.
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
        self.weights.copy_to_model()


def first_failure(error: BaseException) -> BaseException:
    """The error of the lowest failing rank, if this is a collective error of DCP; else the error itself."""
    if isinstance(error, CheckpointException) and error.failures:
        return error.failures[min(error.failures)][0]
    return error


class SavedWeights:
    """Unsharded weights of a `training_state` folder, under the names of the transformers model.

    One process reads one tensor at a time from the files of all ranks, so the whole model is never in memory.
    """

    def __init__(self, folder: Path) -> None:
        quiet()
        self._reader = _Reader(folder)
        entries: dict[str, Any] = self._reader.read_metadata().state_dict_metadata
        self._names = {name.removeprefix(_MODEL): name for name in entries if name.startswith(_MODEL)}
        self._entries = entries

    def meta_tensors(self) -> dict[str, Tensor]:
        """Return the tensors on the meta device."""
        return {short: self._empty(name, "meta") for short, name in self._names.items()}

    def read(self, name: str) -> Tensor:
        """Read one tensor into host memory."""
        found = {self._names[name]: self._empty(self._names[name], "cpu")}
        dcp.load(found, storage_reader=self._reader, no_dist=True)
        return found[self._names[name]]

    def _empty(self, name: str, device: str) -> Tensor:
        entry = self._entries[name]
        return torch.empty(entry.size, dtype=entry.properties.dtype, device=device)


class _Reader(dcp.FileSystemReader):
    """Reads the metadata once instead of once per tensor; with many tensors and ranks it is large."""

    @cached_property
    def _metadata(self) -> Any:
        return super().read_metadata()

    def read_metadata(self, *arguments: Any, **options: Any) -> Any:
        return self._metadata


def _saved_names(folder: Path) -> set[str]:
    return set(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)


def _trained_module(model: RewardModel, weights: TrainedWeights) -> nn.Module:
    """A module whose parameters are those the optimizer updates: the model itself, or a module of master weights."""
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
    """Silence a DCP warning about single processes; permanently, since warning filters are shared by all threads."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


RandomState = dict[str, Any]


def random_state() -> RandomState:
    """Return the current RNG states."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": _text(torch.get_rng_state()),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = _text(torch.cuda.get_rng_state())
    return state


def set_random_state(state: RandomState) -> None:
    """Restore the RNG states returned by `random_state`, also after a round trip through JSON."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, numpy_keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(numpy_keys, np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore the RNG states after the block, so that saving does not change the training that follows."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


BEST_METRIC = "val/accuracy"


@dataclass
class Progress:
    """Counters of the trainer. `step` is also the position in the data."""

    step: int = 0
    """Completed optimizer steps, skipped ones included."""
    bad_steps: int = 0
    """Skipped steps: the loss or a gradient was not finite."""
    bad_in_a_row: int = 0
    validation_pending: bool = False
    """The validation of this step is still due: the run was stopped before it."""
    last_val: dict[str, float] = field(default_factory=dict)
    """Metrics of the last validation."""
    best_step: int | None = None
    """Step of the highest `val/accuracy` so far; the first one if several are equal."""
    best_accuracy: float | None = None

    def note_accuracy(self, metrics: Mapping[str, float]) -> bool:
        """Record the accuracy of this step if it is the best so far; return whether it is."""
        accuracy = metrics.get(BEST_METRIC, math.nan)
        if not accuracy > (-math.inf if self.best_accuracy is None else self.best_accuracy):
            return False
        self.best_step, self.best_accuracy = self.step, accuracy
        return True

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
