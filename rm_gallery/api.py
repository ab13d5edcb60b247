"""Training from Python: `train` runs what `rm-gallery train` runs, in this process."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rm_gallery.scoring import RewardScorer
    from rm_gallery.training.config import TrainConfig


@dataclass(frozen=True)
class TrainResult:
    """The outputs of `train`."""

    run_dir: Path
    checkpoint: Path
    """The newest checkpoint: a Hugging Face sequence-classification folder."""
    metrics: dict[str, float]
    """The last value of each metric, e.g. `train/loss` and `val/accuracy`."""

    @cached_property
    def scorer(self) -> RewardScorer:
        """A `RewardScorer` of the checkpoint, loaded on first use."""
        from rm_gallery.scoring import RewardScorer

        return RewardScorer.from_folder(self.checkpoint)


def train(
    model: str | Path | None = None,
    train_data: Any = None,
    val_data: Any = None,
    *,
    config: str | Path | None = None,
    on_step: Callable[[int, Mapping[str, float]], None] | None = None,
    on_validation: Callable[[int, Mapping[str, float]], None] | None = None,
    on_save: Callable[[int, Path], None] | None = None,
    **settings: Any,
) -> TrainResult:
    """Train a reward model in this process; under torchrun, every process calls it.

    model: folder or hub name of the model to start from, as `model.partial_pretrain`.
    train_data, val_data: what `data.train_files` and `data.val_files` take (a path, folder, URL or hub dataset, or a
    list of these), or rows in memory: a `pandas.DataFrame`, a `datasets.Dataset`, a `pyarrow.Table`, or dicts.
    config: a YAML file with further settings.
    on_step: called with the step and its metrics every `trainer.log_freq` steps; on_validation: with those of each
    validation; on_save: with the step and the folder of each checkpoint, once it is complete. Only the main process
    (rank 0) calls them. An exception that one raises ends the run.
    settings: every other key of the configuration, e.g. `**{"optim.lr": 1e-5, "trainer.total_epochs": 2}`; the sets of
    `trainer.eval_sets` may be rows in memory too.

    As on the command line, a call with the directory of an unfinished run resumes it. Raises `rm_gallery.UserError` for
    errors in configuration, data or environment.

    Example::

        result = train("Qwen2.5-0.5B-Instruct", rows, **{"data.val_fraction": 0.1, "optim.lr": 1e-5})
        result.scorer.score_pairs([{"prompt": "Why?", "chosen": "Because.", "rejected": "No."}])
    """
    from rm_gallery.log import setup_logging
    from rm_gallery.training.callbacks import Callbacks
    from rm_gallery.training.config import load_config
    from rm_gallery.training.run_dir import last_metrics
    from rm_gallery.training.setup import run_training

    if not logging.getLogger("rm_gallery").hasHandlers():
        setup_logging()
    given = {"model.partial_pretrain": model, "data.train_files": train_data, "data.val_files": val_data}
    cache_dir = settings.get("data.cache_dir")
    for key, value in given.items():
        if value is not None:
            settings[key] = str(value) if key.startswith("model.") else _as_files(value, key, cache_dir)
    if isinstance(sets := settings.get("trainer.eval_sets"), Mapping):
        settings["trainer.eval_sets"] = {
            name: rows if isinstance(rows, Mapping) else _as_files(rows, f"eval-{name}", cache_dir)
            for name, rows in sets.items()
        }
    loaded: TrainConfig = load_config(None if config is None else os.fspath(config), [], settings=settings)
    run = run_training(loaded, callbacks=Callbacks(on_step, on_validation, on_save))
    return TrainResult(run.run_dir, run.checkpoint, {**last_metrics(run.run_dir), **run.val_metrics})


def _as_files(data: Any, key: str, cache_dir: str | None) -> Any:
    """Paths as they are; rows in memory as the path of a file in the cache."""
    from rm_gallery.data.sources import save_rows
    from rm_gallery.data.token_cache.prepare import cache_folder

    if isinstance(data, str | Path):
        return str(data)
    if isinstance(data, list | tuple) and data and all(isinstance(each, str | Path) for each in data):
        return [str(each) for each in data]
    return str(save_rows(data, cache_folder(cache_dir) / "rows", key.removeprefix("data.").replace("files", "data")))
