"""The training state: tensors, RNG states, and the progress of the run.

A checkpoint holds weights and optimizer state in float32 (bfloat16 weights and 8-bit moments as they are), sharded or
not, as `model.NAME` and `optimizer.NAME.exp_avg`. The names do not depend on the strategy, so another world size or
strategy reads the same files. RNG states (Python, numpy, torch on the CPU and on this rank's GPU) are plain JSON
values.
"""

from __future__ import annotations

import base64
import logging
import math
import random
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from torch.distributed.tensor import DTensor

from rm_gallery.distributed.collectives import HostGroup
from rm_gallery.errors import UserError, one_line
from rm_gallery.modeling.parallel.ema import NAME as EMA
from rm_gallery.modeling.parallel.ema import AveragedWeights
from rm_gallery.modeling.parallel.master_weights import TrainedWeights
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.training.checkpoint.tensor_files import ShardReader, check_names, open_reader
from rm_gallery.training.metric_names import DEFAULT_METRIC, value_to_compare

log = logging.getLogger(__name__)

_MODEL = "model.network."  # prefix of the names of the transformers model
OBJECTIVE = "objective."
"""Prefix of the names of an objective's parameters."""


class RunTensors:
    """The (master) weights that the optimizer updates, and the optimizer state."""

    def __init__(
        self, model: RewardModel, weights: TrainedWeights, optimizer: torch.optim.Optimizer, *, has_frozen: bool = True,
        ema: AveragedWeights | None = None,
    ) -> None:  # fmt: skip
        """has_frozen: save frozen weights too; an adapter's are in the folder of its base model."""
        self.weights, self.optimizer, self.ema = weights, optimizer, ema
        self._module = _saved_module(model, weights, has_frozen=has_frozen)

    def read(self) -> dict[str, Any]:
        """Return all tensors of this rank by name, without copying them. A collective: every rank calls it."""
        quiet()
        state: dict[str, Any] = {"model": get_model_state_dict(self._module)}
        if self.optimizer.state:
            state["optimizer"] = get_optimizer_state_dict(self._module, self.optimizer)["state"]
        if self.ema is not None:
            state[EMA] = self.ema.tensors
        return state

    def load(self, folder: Path, names: Collection[str], ranks: HostGroup) -> None:
        """Load all tensors from the files `names` of a `training_state` folder. A collective: every rank calls it.

        The optimizer's settings (learning rates, weight decay) stay those of the configuration. Raises UserError on
        every rank when the files cannot be read or their tensors do not fit the model.
        """
        quiet()
        reader, problem = None, None
        try:
            reader = open_reader(folder, names)
        except (OSError, ValueError) as error:
            problem = f"{folder}: cannot be read ({one_line(error, 300)}); choose another checkpoint"
        ranks.raise_problem(problem)
        assert reader is not None
        state: dict[str, Any] = {"model": get_model_state_dict(self._module)}
        # This initializes the optimizer state by a step with learning rate 0, so the weights are loaded afterwards.
        optimizer: dict[str, Any] = get_optimizer_state_dict(self._module, self.optimizer)
        found = optimizer["state"]
        # Parameters without a gradient so far have no state; after skipped steps only, none has.
        saved = {name.rpartition(".")[0] for name in reader.entries if name.startswith("optimizer.")}
        kept = {name: found[name] for name in found if f"optimizer.{name}" in saved}
        if kept:
            state["optimizer"] = kept
        has_ema = any(name.startswith(f"{EMA}.") for name in reader.entries)
        if self.ema is not None and has_ema:
            state[EMA] = self.ema.tensors  # loaded in place
        try:
            trained = {f"model.{name}" for name, _ in self.weights.named_parameters()}
            # Frozen weights are float32 if they are sharded, and else in the compute dtype.
            frozen = {f"model.{name}" for name in state["model"]} - trained
            check_names(reader.entries, _flat(state), cast=frozen)
        except ValueError as error:
            problem = f"{folder}: does not fit this model ({error})"
        ranks.raise_problem(problem)
        try:
            dcp.load(state, storage_reader=reader, process_group=ranks.group)
        except BaseException as error:  # DCP's CheckpointException derives from BaseException
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise UserError(f"{folder}: cannot be read ({one_line(first_failure(error), 300)})") from error
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
        if self.ema is not None and not has_ema:
            log.warning("%s: has no average of weights: that of trainer.ema_decay starts at this step", folder.parent)
            self.ema.reset()

    def find_divergence(self) -> str | None:
        """Describe a weight, or an optimizer state of one, that has diverged on this rank; None if none has.

        Its values are NaN or infinite, or those of a weight exceed `MAX_WEIGHT`.
        """
        for name, parameter in self.weights.named_parameters():
            for key, value in {"weights": parameter, **self.optimizer.state.get(parameter, {})}.items():
                local = value.detach()
                local = local.to_local() if isinstance(local, DTensor) else local
                peak = float(torch.stack(local.aminmax()).abs().max()) if local.numel() else 0.0  # without a copy
                if not math.isfinite(peak):
                    return f"not finite: {name if key == 'weights' else f'{key} of {name}'}"
                if key == "weights" and peak > MAX_WEIGHT:
                    return f"exploded: {name} has values up to {peak:.3g}"
        return None


def _flat(state: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of nested dictionaries under the names that DCP gives them: keys joined by dots."""
    flat: dict[str, Tensor] = {}
    for key, value in state.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat


def first_failure(error: BaseException) -> BaseException:
    """The error of the lowest failing rank, if this is a collective error of DCP; else the error itself."""
    if isinstance(error, CheckpointException) and error.failures:
        return error.failures[min(error.failures)][0]
    return error


class SavedWeights:
    """Unsharded weights of a `training_state` folder, under the names of the transformers model.

    One process reads one tensor at a time from the files of all ranks, so the whole model is never in memory.
    """

    def __init__(self, folder: Path, *, ema: bool = False) -> None:
        """folder: as this version writes it. ema: the average of the weights that were trained, instead of these."""
        reader = open_reader(folder, [path.name for path in folder.iterdir()])
        assert isinstance(reader, ShardReader)
        self._reader = reader
        self._names = {name.removeprefix(_MODEL): name for name in reader.entries if name.startswith(_MODEL)}
        self._start = EMA if ema else "model"
        if ema:
            averages = {name: f"{EMA}.{full.removeprefix('model.')}" for name, full in self._names.items()}
            self._names |= {name: each for name, each in averages.items() if each in reader.entries}

    def meta_tensors(self) -> dict[str, Tensor]:
        """Return the tensors on the meta device."""
        entries = {short: self._reader.entries[name] for short, name in self._names.items()}
        return {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in entries.items()
        }

    def objective(self) -> dict[str, Tensor]:
        """The parameters of the objective by name; {} if it has none."""
        start = f"{self._start}.{OBJECTIVE}"
        names = [name for name in self._reader.entries if name.startswith(start)]
        return {name.removeprefix(start): self._reader.read_tensor(name) for name in names}

    def read(self, name: str) -> Tensor:
        """Read one tensor into host memory."""
        return self._reader.read_tensor(self._names[name])


def _saved_module(model: RewardModel, weights: TrainedWeights, *, has_frozen: bool) -> nn.Module:
    """A module with the weights to save, whose parameters are those the optimizer updates, or the model itself.

    Frozen weights are its buffers with `has_frozen`, in the dtype that the model has them in; otherwise they and the
    model's own buffers are omitted.
    """
    masters, parameters = dict(weights.named_parameters()), dict(model.named_parameters())
    if set(masters.values()) == set(parameters.values()):
        return model
    module = nn.Module()
    for name, value in [*masters.items(), *model.state_dict(keep_vars=True).items()]:
        if name not in masters and not has_frozen:
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
            place.register_buffer(last, value.detach())
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
    kind, numpy_keys, position, *rest = state["numpy"]
    if len(numpy_keys) != 624 or not 0 <= position <= 624:  # numpy would read beyond its array
        raise ValueError("the state of numpy has another length")
    np.random.set_state((kind, np.array(numpy_keys, np.uint32), position, *rest))
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


MAX_WEIGHT = 65_504
"""The largest finite float16: a larger weight is infinite for readers that compute in it."""
LOSS_METRIC = "val/loss"


@dataclass
class Progress:
    """Counters of the trainer. `step` is also the position in the data."""

    __pydantic_config__ = {"extra": "forbid"}

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
    """Step of the best value of `best_metric` so far; the first one if several are equal."""
    best_accuracy: float | None = None
    """That value."""
    last_loss: float | None = None
    """Training loss of the last step that was not skipped."""
    highest_accuracy: float | None = None
    """The best value of `best_metric` so far, for early stopping."""
    validations_since_highest: int = 0
    last_val_step: int | None = None
    """Step of `last_val`; None before the first validation, and in checkpoints of earlier versions."""
    best_metric: str = DEFAULT_METRIC
    """`trainer.save_best_metric`, for which checkpoints are saved and early stopping waits."""

    @property
    def reward_statistics(self) -> tuple[float, float] | None:
        """See `statistics_of`."""
        return self.statistics_of("val")

    def statistics_of(self, prefix: str) -> tuple[float, float] | None:
        """Mean and standard deviation of the validation rewards with the weights of this step.

        prefix: `val`, or `val/ema` for the average of the weights.
        None if this step was not validated, and if they cannot normalize a reward: not finite, or no deviation.
        """
        if self.last_val_step != self.step or not self.step:
            return None
        mean, std = (self.last_val.get(f"{prefix}/reward_{name}", math.nan) for name in ("mean", "std"))
        return (mean, std) if math.isfinite(mean) and math.isfinite(std) and std > 0 else None

    def use_metric(self, name: str) -> bool:
        """Compare by this metric from now on; returns whether values of another one are forgotten for it."""
        if name == self.best_metric:
            return False
        had_values = self.highest_accuracy is not None
        self.best_metric, self.validations_since_highest = name, 0
        self.best_step = self.best_accuracy = self.highest_accuracy = None
        return had_values

    def note_best(self, metrics: Mapping[str, float]) -> bool:
        """Record the metric of this step if it is the best so far; return whether it is."""
        if not self._is_better(metrics, self.best_accuracy):
            return False
        self.best_step, self.best_accuracy = self.step, metrics[self.best_metric]
        return True

    def count_validation(self, metrics: Mapping[str, float]) -> None:
        """Update `highest_accuracy` and `validations_since_highest`."""
        self.validations_since_highest += 1
        if self._is_better(metrics, self.highest_accuracy):
            self.highest_accuracy, self.validations_since_highest = metrics[self.best_metric], 0

    def _is_better(self, metrics: Mapping[str, float], best: float | None) -> bool:
        """Whether the metric is better than `best`; NaN never is."""
        value = value_to_compare(metrics, self.best_metric)
        return value > (-math.inf if best is None else value_to_compare({self.best_metric: best}, self.best_metric))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
