"""Saving: every rank writes its shards, rank 0 completes the folder, synchronously or in the background.

The Hugging Face files of a checkpoint are written from the saved training state and checked by rescoring a few texts.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.tokenization.token_group import TokenGroup
from rm_gallery.distributed.collectives import HostGroup
from rm_gallery.errors import TrainingStopped, UserError, one_line
from rm_gallery.files import MANIFEST, sha256_files, write_manifest
from rm_gallery.modeling.adapters import Adapter
from rm_gallery.modeling.export import InputRecord, check_rewards, write_folder
from rm_gallery.modeling.language_folder import check_losses, write_language_folder
from rm_gallery.modeling.parallel.ema import NAME as EMA
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.training.checkpoint.facts import FACTS_NAME, STATE_NAME, rank_name
from rm_gallery.training.checkpoint.folders import (
    hidden,
    keep_newest,
    last_good,
    list_checkpoints,
    name_best,
    publish,
)
from rm_gallery.training.checkpoint.mirror import Mirror
from rm_gallery.training.checkpoint.state import (
    Progress,
    RunTensors,
    SavedWeights,
    first_failure,
    preserve_random_state,
    quiet,
    random_state,
)
from rm_gallery.training.checkpoint.tensor_files import SUFFIX, ShardWriter
from rm_gallery.training.model_card import CARD_NAME, NOT_UPLOADED
from rm_gallery.training.trainer_config import CheckpointConfig

log = logging.getLogger(__name__)


class Checkpoints:
    """Saves a run. The first and the last checkpoint are verified by rescoring, the others by their hashes."""

    def __init__(
        self, run_dir: Path, config: CheckpointConfig, tensors: RunTensors, weights_folder: WeightsFolder,
        ranks: HostGroup, *, facts: Mapping[str, Any], mirror: Mirror | None = None, latest: Path | None = None,
        card: Callable[[Progress, Mapping[str, Any], bool], str] | None = None,
    ) -> None:  # fmt: skip
        """facts: of the run, for state.json. mirror: on rank 0.

        card: gives the text of the model card, from the progress, `WeightsFolder.objective`, and whether it is that of
        the average of the weights.

        latest: the checkpoint that the run resumes from.
        """
        self.run_dir, self.config, self.tensors, self.weights_folder = run_dir, config, tensors, weights_folder
        self.ranks, self.facts, self.mirror, self.card = ranks, facts, mirror, card
        self.latest = latest
        """The newest complete checkpoint of the run."""
        self._thread_ranks = ranks.for_thread()  # collectives of the worker must not mix with those of training
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saving")
        self._pending: Future[Path] | None = None
        self._expected: dict[str, list[float]] = {}  # rewards of the pending checkpoint by folder, if it is rescored
        self._is_first = True

    def save(self, progress: Progress, sums: Mapping[str, float], *, is_last: bool = False) -> None:
        """Write `global_step_N` and verify it; with `async_save` and not `is_last`, in the background.

        sums: metric sums of this rank since the last log line. A collective: every rank calls it.
        Raises UserError on every rank when this save or the previous one cannot be written or does not reproduce the
        trainer's rewards; TrainingStopped when the model or the optimizer state is not finite, which no later step can
        repair. Earlier checkpoints stay intact.
        """
        self.wait()
        with preserve_random_state():
            rewards = self.weights_folder.expected()
            self._refuse_diverged(progress, rewards)
            save = _Save(self, progress, sums)
            if self._is_first or is_last:
                self._expected = {".": rewards}
                if self.tensors.ema is not None:
                    with self.tensors.ema.applied():
                        self._expected[EMA] = self.weights_folder.expected()
            self._is_first = False
            background = self.config.async_save and not is_last
            self._pending = save.start(self._worker if background else None)
            if not background:
                self.wait()

    def _refuse_diverged(self, progress: Progress, rewards: Sequence[float]) -> None:
        """Raise TrainingStopped on every rank if weights or optimizer state have diverged, or no reward is finite."""
        fault = self.tensors.find_divergence()
        if fault is None and rewards and not any(map(math.isfinite, rewards)):
            fault = "not finite: the rewards of the shortest training texts"
        for rank, found in enumerate(self.ranks.all_gather(fault)):
            if found:
                where = f" on rank {rank}" if self.ranks.world_size > 1 else ""
                raise TrainingStopped(
                    f"step {progress.step}: {found}{where}; global_step_{progress.step} is not written; "
                    f"{self.describe_last_good(progress)}. Lower optim.lr"
                )

    def describe_last_good(self, progress: Progress) -> str:
        """Part of a message: the checkpoint to use after a divergence at this point."""
        folders = list_checkpoints(self.run_dir)
        if self.latest is not None and self.latest not in folders:
            folders.append(self.latest)  # the one of another run that this run resumed from
        if not folders:
            return "no checkpoint was written"
        good = last_good(folders, progress.step - progress.bad_in_a_row)
        return f"the last checkpoint from before is {good}" if good else "no checkpoint from before is left"

    def has_failed(self) -> bool:
        """Whether a background save has failed on this rank; `wait` raises its error then. Does not block."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Wait for the save in the background. A collective: every rank calls it; raises as `save` does."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        expected, self._expected = self._expected, {}
        folder = pending.result()
        problem = None
        if expected and self.ranks.rank == 0:
            try:
                with preserve_random_state():
                    for name, rewards in expected.items():
                        self.weights_folder.check(folder / name, rewards)
            except UserError as error:
                problem = str(error)
        self.ranks.raise_problem(problem)
        self.latest = folder

    def close(self, *, wait_for_uploads: bool = True) -> None:
        """Wait for the save in the background, and for uploads if asked to. Logs a failed save instead of raising."""
        self._worker.shutdown(wait=True)
        if self._pending is not None and self._pending.exception() is not None:
            log.warning("%s", self._pending.exception())
        if self.mirror is not None:
            self.mirror.close(self.run_dir, wait=wait_for_uploads)


class _Save:
    """One checkpoint being written."""

    def __init__(self, owner: Checkpoints, progress: Progress, sums: Mapping[str, float]) -> None:
        self.owner, self.ranks = owner, owner._thread_ranks
        self.folder = owner.run_dir / f"global_step_{progress.step}"
        self.staging = hidden(self.folder, "saving")
        self.state = self.staging / STATE_NAME
        self.progress = Progress(**progress.as_dict())
        self.rank_facts = {"random": random_state(), "sums": dict(sums)}
        self.run_facts = {**owner.facts, "world_size": self.ranks.world_size, "progress": progress.as_dict()}

    def start(self, worker: ThreadPoolExecutor | None) -> Future[Path]:
        """Take a snapshot and write it in the worker, or write at once without a worker."""
        problem = None
        if self.ranks.rank == 0:
            try:
                shutil.rmtree(self.staging, ignore_errors=True)
                self.state.mkdir(parents=True)
            except OSError as error:
                problem = self._cannot(error)
        self.owner.ranks.raise_problem(problem)
        tensors = self.owner.tensors.read()
        quiet()
        writer = ShardWriter(self.state, self.ranks.rank)
        if worker is not None:
            written = dcp.async_save(
                tensors, checkpoint_id=self.state, storage_writer=writer, process_group=self.ranks.group
            )
            assert isinstance(written, Future)
            return worker.submit(self._finish, written.result)
        done: Future[Path] = Future()
        try:
            done.set_result(
                self._finish(
                    lambda: dcp.save(
                        tensors, checkpoint_id=self.state, storage_writer=writer, process_group=self.ranks.group
                    )
                )
            )
        except UserError as error:
            done.set_exception(error)
        return done

    def _finish(self, write_tensors: Callable[[], Any]) -> Path:
        """Write the tensors, or wait for them, and complete the checkpoint. All ranks raise the same error, or none."""
        problem, hashes = None, {}
        try:
            write_tensors()
            hashes = self._write_rank_facts()
        except (OSError, RuntimeError, CheckpointException) as error:
            problem = self._cannot(error)
        reports = self.ranks.all_gather((problem, hashes))
        problem = next((each for each, _ in reports if each), None)
        if self.ranks.rank == 0:
            try:
                if problem is None:
                    self._finish_folder({name: value for _, each in reports for name, value in each.items()})
            except (OSError, RuntimeError) as error:
                problem = self._cannot(error)
            if problem:
                shutil.rmtree(self.staging, ignore_errors=True)
        problem = self.ranks.broadcast(problem)
        if problem:
            raise UserError(problem)
        log.info("saved %s", self.folder)
        return self.folder

    def _write_rank_facts(self) -> dict[str, str]:
        """Write rank_N.json; return the hashes of this rank's files by their path in the checkpoint."""
        rank = self.ranks.rank
        (self.state / rank_name(rank)).write_text(json.dumps(self.rank_facts), encoding="utf-8")
        names = [rank_name(rank), *(path.name for path in self.state.glob(f"rank_{rank}_*{SUFFIX}"))]
        return sha256_files(self.staging, [f"{STATE_NAME}/{name}" for name in names])

    def _finish_folder(self, hashes: dict[str, str]) -> None:
        """Write the files of rank 0 and commit the checkpoint. hashes: of the files of all ranks."""
        missing = [name for name in hashes if not (self.staging / name).is_file()]
        if missing:
            raise OSError(f"{missing[0]} of another node is not visible here; all nodes must share the run directory")
        (self.state / FACTS_NAME).write_text(json.dumps(self.run_facts, indent=2) + "\n", encoding="utf-8")
        (self.staging / ".gitignore").write_text("\n".join(NOT_UPLOADED) + "\n", encoding="utf-8")
        statistics = self.progress.reward_statistics
        weights = self._write_model(self.staging, statistics)
        if self.owner.tensors.ema is not None:
            average = self.staging / EMA
            found = self._write_model(average, self.progress.statistics_of(f"val/{EMA}"), ema=True)
            write_manifest(average, found)
            found |= sha256_files(average, [MANIFEST])
            weights |= {f"{EMA}/{name}": value for name, value in found.items()}
        if self.owner.config.reward_statistics == "normalize" and statistics is None:
            log.warning(
                "%s has no mean and std (trainer.reward_statistics=normalize): rewards of this step's weights were not "
                "measured, or all are equal; set trainer.save_freq to a multiple of trainer.test_freq", self.folder,
            )  # fmt: skip
        own = sha256_files(self.staging, [f"{STATE_NAME}/{FACTS_NAME}"])
        publish(self.staging, self.folder, {**hashes, **weights, **own})
        self._after()

    def _write_model(
        self, folder: Path, statistics: tuple[float, float] | None, *, ema: bool = False
    ) -> dict[str, str]:
        """Write the Hugging Face files and the model card; see `WeightsFolder.write`."""
        hashes = self.owner.weights_folder.write(folder, self.state, statistics, ema=ema)
        if self.owner.card is not None:
            values = self.owner.weights_folder.objective(self.state, ema=ema)
            (folder / CARD_NAME).write_text(self.owner.card(self.progress, values, ema), encoding="utf-8")
            hashes |= sha256_files(folder, [CARD_NAME])
        return hashes

    def _after(self) -> None:
        owner, run_dir, best_step = self.owner, self.owner.run_dir, self.progress.best_step
        if owner.config.save_best:
            name_best(run_dir, self.progress)

        def prune() -> None:
            if not self.progress.bad_in_a_row:  # after a divergence only earlier checkpoints are good
                keep_newest(run_dir, owner.config.max_ckpt_to_keep, best_step)

        if owner.mirror is not None:
            owner.mirror.add(run_dir, prune)  # a checkpoint is uploaded before it may be deleted
        else:
            prune()

    def _cannot(self, error: BaseException) -> str:
        reason = one_line(first_failure(error))
        return f"{self.folder}: the checkpoint could not be written ({reason}); earlier checkpoints are intact"


@dataclass(frozen=True)
class WeightsFolder:
    """Writes and verifies the Hugging Face files of a checkpoint."""

    model: RewardModel
    tokenizer: Any
    record: InputRecord
    dtype: torch.dtype
    """Data type of the written weights."""
    device: torch.device
    """Device of the model."""
    exact: bool
    """Whether the model computes in float32 and is written in float32, so that no rounding hides a difference."""
    probes: Sequence[TokenGroup]
    """A few short groups to rescore."""
    adapter: Adapter | None = None
    """With LoRA: what is written instead of the whole model."""
    normalize: bool = False
    """Whether config.json has mean and standard deviation under the names of other programs too."""
    describe: Callable[[Mapping[str, Tensor]], dict[str, Any]] = lambda parameters: {}
    """Plain values for the record from the parameters of the objective; see `Objective.record`."""

    def write(
        self, folder: Path, state: Path, statistics: tuple[float, float] | None = None, *, ema: bool = False
    ) -> dict[str, str]:
        """Write the files into a folder from a `training_state`; return the SHA-256 of each by its name.

        statistics: mean and standard deviation of rewards with these weights, for the record. ema: see `SavedWeights`.
        Raises OSError when the disk is full or the weights on disk differ from those in memory.
        """
        saved = SavedWeights(state, ema=ema)
        mean, std = statistics or (None, None)
        record = replace(self.record, reward_mean=mean, reward_std=std, objective=self.objective(state, ema=ema))
        return write_folder(
            folder, self.model, saved.meta_tensors(), self.tokenizer, self.dtype, record, read=saved.read,
            adapter=self.adapter, normalize=self.normalize,
        )  # fmt: skip

    def objective(self, state: Path, *, ema: bool = False) -> dict[str, Any]:
        """Plain values of the parameters of the objective in a `training_state`; {} if it has none."""
        parameters = SavedWeights(state, ema=ema).objective()
        return {**self.record.objective, **self.describe(parameters)} if parameters else {}

    def expected(self) -> list[float]:
        """Return the rewards of the probes now. A collective: every rank calls it."""
        with self.model.inference():
            rewards: list[float] = self.model(collate(self.probes).to(self.device)).flatten().tolist()
        return rewards

    def check(self, folder: Path, expected: Sequence[float]) -> None:
        """Compare with the rewards of the written model. Raises UserError that names the first difference."""
        texts = [[*group.prefix.tolist(), *tail.tolist()] for group in self.probes for tail in group.tails]
        check_rewards(folder, texts, expected, exact=self.exact)


@dataclass(frozen=True)
class LanguageFolder(WeightsFolder):
    """The same for a language model, whose losses are compared."""

    def write(
        self, folder: Path, state: Path, statistics: tuple[float, float] | None = None, *, ema: bool = False
    ) -> dict[str, str]:
        saved = SavedWeights(state, ema=ema)
        return write_language_folder(
            folder, self.model, saved.meta_tensors(), self.tokenizer, self.dtype, read=saved.read,
            adapter=self.adapter,
        )  # fmt: skip

    def expected(self) -> list[float]:
        """Return the mean loss of the targets of each probe now. A collective: every rank calls it."""
        found = []
        with self.model.inference():
            for group in self.probes:
                batch = collate([group]).to(self.device)
                losses = self.model(batch).each.double()
                found.append(float((losses * batch.target_times).sum() / batch.target_times.sum()))
        return found

    def check(self, folder: Path, expected: Sequence[float]) -> None:
        check_losses(folder, self.probes, expected, exact=self.exact)
