"""Workers on a Ray cluster: `rm-gallery score --engine ray`, with the extra `ray`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rm_gallery.data.sources import Row
from rm_gallery.errors import UserError
from rm_gallery.scoring.jobs import ComputeSettings, ScoringJob
from rm_gallery.scoring.model_folder import ServedModel
from rm_gallery.scoring.parts import Result
from rm_gallery.scoring.workers import Pool, Worker, WorkerSpec

log = logging.getLogger(__name__)


class RayPool(Pool):
    """Actors, each with one GPU, or on a cluster without GPUs with one CPU."""

    def __init__(self, spec: WorkerSpec, count: int | None, settings: ComputeSettings) -> None:
        """count: of workers; None for one per GPU. Raises UserError without Ray, and for more than the cluster has."""
        try:
            import ray
        except ImportError as error:
            raise UserError(f"--engine ray needs Ray: pip install 'rm-gallery[ray]' ({error})") from error
        self._ray, self._owns = ray, not ray.is_initialized()
        if self._owns:  # the cluster that RAY_ADDRESS names, or one on this machine
            ray.init(
                address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level=logging.ERROR,
                include_dashboard=False if "RAY_ADDRESS" not in os.environ else None,
            )  # fmt: skip
        has = ray.cluster_resources()
        uses_gpu = settings.device == "cuda"
        number = int(has.get("GPU" if uses_gpu else "CPU", 0))
        count = count or (number if uses_gpu else 1)
        if count > number and not isinstance(spec.model, ServedModel):
            self._shutdown()
            what = "GPUs" if uses_gpu else "CPUs"
            raise UserError(f"--processes {count}: the Ray cluster has {number} {what}, one for each; set fewer")
        if not uses_gpu:
            if has.get("GPU") and not isinstance(spec.model, ServedModel):
                log.warning("the Ray cluster has GPUs, but this machine has none, so the workers run on CPUs")
            spec = replace(spec, options=replace(spec.options, device="cpu"))
        super().__init__(spec, count)
        self._actor = ray.remote(num_cpus=0 if uses_gpu else 1, num_gpus=1 if uses_gpu else 0)(Worker)

    def start(self, number: int) -> Any:
        return self._actor.remote(self.spec)

    def send(self, worker: Any, job: ScoringJob, rows: list[Row]) -> Any:
        return worker.score.remote(job, rows)

    def wait(self, sent: Sequence[Any]) -> list[tuple[Any, list[Result] | Exception | None]]:
        ready, _ = self._ray.wait(list(sent), num_returns=1)
        found: list[tuple[Any, list[Result] | Exception | None]] = []
        for each in ready:
            try:
                found.append((each, self._ray.get(each)))
            except self._ray.exceptions.RayActorError as error:
                log.debug("%s", error)
                found.append((each, None))
        return found

    def stop(self, worker: Any) -> None:
        self._ray.kill(worker)

    def close(self) -> None:
        super().close()
        self._shutdown()

    def _shutdown(self) -> None:
        if self._owns:
            self._ray.shutdown()
