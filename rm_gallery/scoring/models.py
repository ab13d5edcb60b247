"""The models of `rm-gallery score` and `rank`: folders, hub models and servers, and the ensemble that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rm_gallery.errors import UserError
from rm_gallery.scoring.ensemble import ENSEMBLE, Reduction, shared_scale
from rm_gallery.scoring.jobs import ScoreOptions, name_models
from rm_gallery.scoring.model_folder import GivenRewards, ModelFolder, ServedModel, choose_checkpoint, file_of
from rm_gallery.scoring.remote import names_servers, open_servers, short_name

if TYPE_CHECKING:
    from rm_gallery.scoring.remote import RemoteScorer
    from rm_gallery.scoring.scorer import RewardScorer


def open_models(options: ScoreOptions) -> tuple[ScoreOptions, list[ModelFolder | ServedModel | GivenRewards]]:
    """The options with runs resolved to checkpoints, and their models.

    Raises UserError for a path that does not exist, a run without a checkpoint, and a tokenizer without a server.
    """
    if options.rewards is not None:
        return options, [GivenRewards(options.rewards)]
    if options.tokenizer is not None and not any(map(names_servers, options.models)):
        raise UserError(f"--tokenizer {options.tokenizer}: it is for models behind servers; remove it")
    found: list[ModelFolder | ServedModel | GivenRewards] = []
    for model in options.models:
        if names_servers(model):
            found.append(ServedModel(model, options.tokenizer))
        else:
            folder = choose_checkpoint(model, key="model")
            found.append(ModelFolder(folder, options.base, quantized=options.quantized))
    return replace(options, models=tuple(each.model for each in found)), found


def name_all(models: Sequence[str]) -> list[str]:
    """Short unique names of the models of a command; see `name_models`."""
    return name_models([short_name(model) if names_servers(model) else model for model in models])


def find_ensemble(
    options: ScoreOptions, names: Sequence[str]
) -> tuple[Reduction | None, list[tuple[float, float]] | None]:
    """How the models' rewards are combined, and their scales. Raises UserError for models that cannot be."""
    if options.ensemble is None:
        return None, None
    reduction = Reduction(options.ensemble, key="--ensemble")
    if len(names) < 2:
        raise UserError("--ensemble combines the rewards of several models; give --model more than once")
    if ENSEMBLE in names:
        raise UserError(f"--model: {ENSEMBLE} is the name of the ensemble's columns; rename the folder")
    if options.normalize:
        return reduction, None  # the models' own columns are normalized
    return reduction, shared_scale(options.models, options.normalize, options.weights)


def find_attributes(options: ScoreOptions) -> tuple[str, ...]:
    """The names of the models' outputs, which must be the same. Raises UserError for `--weights` of others."""
    from rm_gallery.modeling.export import InputRecord, read_record
    from rm_gallery.scoring.engine import columns_of, find_weights

    found: list[tuple[str, ...]] = []
    for model in options.models:
        if names_servers(model):
            if options.weights is not None:
                raise UserError(f"--weights: model={model}: a server has its own weights; remove the option")
            found.append(())
            continue
        config = file_of(model, "config.json")
        record = (None if config is None else read_record(config.parent)) or InputRecord("text")
        try:
            find_weights(record, options.weights)
        except UserError as error:
            raise UserError(f"--weights: model={model}: {error}") from error
        found.append(columns_of(record))
    if len(set(found)) > 1:
        raise UserError("--model: the models have different attributes, so their columns differ; score them one by one")
    return found[0] if found else ()


def check_models(options: ScoreOptions) -> None:
    """Raise UserError for a model that cannot be loaded, before the rewards of those before it are computed."""
    from rm_gallery.modeling.export import read_statistics
    from rm_gallery.scoring.loading import check_folder, no_statistics

    for model in options.models:
        if names_servers(model):
            if options.normalize:
                raise no_statistics(model)
            _connect(model, options).close()
            continue
        check_folder(model, trust_remote_code=options.trust_remote_code, base=options.base)
        config = file_of(model, "config.json")
        if options.normalize and (config is None or read_statistics(config.parent) is None):
            raise no_statistics(model)


class LazyScorer:
    """The scorer of one model, loaded when the first row needs it."""

    def __init__(self, options: ScoreOptions, model: ModelFolder | ServedModel) -> None:
        self._options, self._model = options, model
        self._scorer: RewardScorer | RemoteScorer | None = None

    def get(self) -> RewardScorer | RemoteScorer:
        """The scorer."""
        if self._scorer is None and isinstance(self._model, ServedModel):
            self._scorer = _connect(self._model.model, self._options)
        elif self._scorer is None:
            from rm_gallery.scoring.scorer import RewardScorer

            self._model.fingerprint  # noqa: B018 - before the weights are read
            self._scorer = RewardScorer.from_folder(
                self._model.model,
                device=self._options.device,
                dtype=self._options.dtype,  # type: ignore[arg-type]  # checked there
                token_budget=self._options.token_budget,
                trust_remote_code=self._options.trust_remote_code,
                template_date=self._options.template_date,
                base=self._options.base,
                normalize=bool(self._options.normalize),
                quantized=self._options.quantized,
                weights=self._options.weights,
            )
            self._model.check_unchanged()
        return self._scorer

    def close(self) -> None:
        """Free it."""
        if self._scorer is not None:
            self._scorer.close()


def _connect(model: str, options: ScoreOptions) -> RemoteScorer:
    return open_servers(model, tokenizer=options.tokenizer, template_date=options.template_date)
