"""Saving: every rank writes its share, rank 0 finishes the folder; in the foreground or beside the training.

The Hugging Face files of a checkpoint are written from the training state, and checked by rescoring.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.tokenization.token_group import TokenGroup
from rm_gallery.errors import UserError, one_line
from rm_gallery.files import sha256_files
from rm_gallery.modeling.export import InputRecord, check_manifest, check_rewards, write_folder
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.training.checkpoint.folders import (
    FACTS_NAME,
    STATE_NAME,
    hidden,
    keep_newest,
    name_best,
    publish,
)
from rm_gallery.training.checkpoint.mirror import Copies
from rm_gallery.training.checkpoint.state import (
    Progress,
    RunTensors,
    SavedWeights,
    first_failure,
    quiet,
    random_state,
    random_state_kept,
)
from rm_gallery.training.collectives import Ranks
from rm_gallery.training.config import CheckpointConfig

log = logging.getLogger(__name__)


class Checkpoints:
    """Saves a run; the first and the last save are checked by rescoring, the others by their hashes."""

    def __init__(
        self, run_dir: Path, config: CheckpointConfig, tensors: RunTensors, weights_folder: WeightsFolder, ranks: Ranks,
        *, facts: Mapping[str, Any], copies: Copies | None = None, latest: Path | None = None,
    ) -> None:  # fmt: skip
        """facts: of the run, kept beside its progress. copies: on rank 0. latest: that the run goes on from."""
        self.run_dir, self.config, self.tensors, self.weights_folder = run_dir, config, tensors, weights_folder
        self.ranks, self.facts, self.copies = ranks, facts, copies
        self.latest = latest
        """The newest checkpoint of the run that is complete."""
        self._quiet_ranks = ranks.apart()  # for the thread: its agreements must not mix with the training's
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saving")
        self._pending: Future[Path] | None = None
        self._expected: list[float] | None = None  # rewards of a checkpoint that is still to be rescored
        self._is_first = True

    def save(self, progress: Progress, sums: Mapping[str, float], *, is_last: bool = False) -> None:
        """Write `global_step_N` and check it; with `async_save` and not `is_last`, go on while that happens.

        sums: of this rank, since the last log line. Every rank calls it at the same place.
        Raises UserError on every rank when this save or the one before cannot be written or does not give the
        trainer's rewards; earlier ones stay whole.
        """
        self.wait()
        with random_state_kept():
            job = _Job(self, progress, sums)
            if self._is_first or is_last:
                self._expected = self.weights_folder.expected()
            self._is_first = False
            background = self.config.async_save and not is_last
            self._pending = job.start(self._worker if background else None)
            if not background:
                self.wait()

    def has_failed(self) -> bool:
        """Whether a save beside the training has ended badly on this rank; `wait` then raises. Takes no time."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Until nothing is being written. Every rank calls it at the same place; raises as `save` does."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        expected, self._expected = self._expected, None
        folder = pending.result()
        problem = None
        if expected is not None and self.ranks.rank == 0:
            try:
                with random_state_kept():
                    self.weights_folder.check(folder, expected)
            except UserError as error:
                problem = str(error)
        self.ranks.settle(problem)
        self.latest = folder

    def close(self, *, hurry: bool = False) -> None:
        """Let what is being written be finished; copies too, unless there is a hurry. Never raises for a save."""
        self._worker.shutdown(wait=True)
        if self._pending is not None and self._pending.exception() is not None:
            log.warning("%s", self._pending.exception())
        if self.copies is not None:
            self.copies.close(self.run_dir, hurry=hurry)


class _Job:
    """One save."""

    def __init__(self, owner: Checkpoints, progress: Progress, sums: Mapping[str, float]) -> None:
        self.owner, self.ranks = owner, owner._quiet_ranks
        self.folder = owner.run_dir / f"global_step_{progress.step}"
        self.staging = hidden(self.folder, "saving")
        self.state = self.staging / STATE_NAME
        self.progress = Progress(**progress.as_dict())
        self.rank_facts = {"random": random_state(), "sums": dict(sums)}
        self.run_facts = {**owner.facts, "world_size": self.ranks.world_size, "progress": progress.as_dict()}

    def start(self, worker: ThreadPoolExecutor | None) -> Future[Path]:
        """Copy what training will change, then write: in the worker, or here and now."""
        problem = None
        if self.ranks.rank == 0:
            try:
                shutil.rmtree(self.staging, ignore_errors=True)
                self.state.mkdir(parents=True)
            except OSError as error:
                problem = self._cannot(error)
        self.owner.ranks.settle(problem)
        tensors = self.owner.tensors.read()
        quiet()
        if worker is not None:
            written = dcp.async_save(tensors, checkpoint_id=self.state, process_group=self.ranks.group)
            assert isinstance(written, Future)
            return worker.submit(self._finish, written)
        written = Future()
        try:
            written.set_result(dcp.save(tensors, checkpoint_id=self.state, process_group=self.ranks.group))
        except (OSError, CheckpointException) as error:
            written.set_exception(error)
        done: Future[Path] = Future()
        try:
            done.set_result(self._finish(written))
        except UserError as error:
            done.set_exception(error)
        return done

    def _finish(self, written: Future[Any]) -> Path:
        """All that comes after the tensors; the ranks agree on how it went, so all raise the same or none does."""
        problem, hashes = None, {}
        try:
            written.result()
            hashes = self._write_rank_facts()
        except (OSError, RuntimeError, CheckpointException) as error:
            problem = self._cannot(error)
        reports = self.ranks.gather((problem, hashes))
        problem = next((each for each, _ in reports if each), None)
        if self.ranks.rank == 0:
            try:
                if problem is None:
                    self._finish_folder({name: value for _, each in reports for name, value in each.items()})
            except (OSError, RuntimeError) as error:
                problem = self._cannot(error)
            if problem:
                shutil.rmtree(self.staging, ignore_errors=True)
        problem = self.ranks.share(problem)
        if problem:
            raise UserError(problem)
        log.info("saved %s", self.folder)
        return self.folder

    def _write_rank_facts(self) -> dict[str, str]:
        """Hashes of the files of this rank, by their path in the checkpoint."""
        rank = self.ranks.rank
        (self.state / f"rank_{rank}.json").write_text(json.dumps(self.rank_facts), encoding="utf-8")
        names = [f"rank_{rank}.json", *(path.name for path in self.state.glob(f"__{rank}_*"))]
        return sha256_files(self.staging, [f"{STATE_NAME}/{name}" for name in names])

    def _finish_folder(self, hashes: dict[str, str]) -> None:
        lost = [name for name in hashes if not (self.staging / name).is_file()]
        if lost:
            raise OSError(f"{lost[0]} of another node is not to be seen here; all nodes must share the run folder")
        (self.state / FACTS_NAME).write_text(json.dumps(self.run_facts, indent=2) + "\n", encoding="utf-8")
        names = self.owner.weights_folder.write(self.staging, self.state)
        own = [*names, f"{STATE_NAME}/{FACTS_NAME}", f"{STATE_NAME}/.metadata"]
        publish(self.staging, self.folder, {**hashes, **sha256_files(self.staging, own)})
        self._after()

    def _after(self) -> None:
        owner, run_dir, best_step = self.owner, self.owner.run_dir, self.progress.best_step
        if owner.config.save_best:
            name_best(run_dir, self.progress)

        def tidy() -> None:
            keep_newest(run_dir, owner.config.max_ckpt_to_keep, best_step)

        if owner.copies is not None:
            owner.copies.add(run_dir, tidy)
        else:
            tidy()

    def _cannot(self, error: BaseException) -> str:
        reason = one_line(first_failure(error))
        return f"{self.folder}: the checkpoint could not be written ({reason}); earlier checkpoints are intact"


@dataclass(frozen=True)
class WeightsFolder:
    """How a run writes its Hugging Face folders."""

    model: RewardModel
    tokenizer: Any
    record: InputRecord
    dtype: torch.dtype
    """Of the written weights."""
    device: torch.device
    """Where the model computes."""
    exact: bool
    """Whether the model computes in float32 and the files hold it, so that no rounding hides a difference."""
    probes: Sequence[TokenGroup]
    """A few short groups, which are rescored."""

    def write(self, folder: Path, state: Path) -> list[str]:
        """Write the files into a folder that is there already, from a `training_state`; returns their names.

        Raises OSError when the disk is full or a file came out damaged.
        """
        inner = folder / "model"
        saved = SavedWeights(state)
        write_folder(inner, self.model, saved.outline(), self.tokenizer, self.dtype, self.record, read=saved.read)
        damaged = check_manifest(inner)
        if damaged:
            raise OSError(f"{damaged[0]} came out damaged; check the disk")
        names = sorted(path.name for path in inner.iterdir())
        for name in names:
            os.replace(inner / name, folder / name)
        inner.rmdir()
        return names

    def expected(self) -> list[float]:
        """What the model gives the probes now. Every rank calls it at the same place."""
        with self.model.inference():
            rewards: list[float] = self.model(collate(self.probes).to(self.device)).tolist()
        return rewards

    def check(self, folder: Path, expected: Sequence[float]) -> None:
        """Compare with what the files give. Raises UserError that names the largest difference."""
        texts = [[*group.prefix.tolist(), *tail.tolist()] for group in self.probes for tail in group.tails]
        check_rewards(folder, texts, expected, exact=self.exact)
