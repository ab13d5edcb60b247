"""Scorers: everything that gives responses rewards, behind one protocol.

`open_scorer` makes one of a model folder or hub name (our checkpoint, an adapter, another classifier with one label),
an ensemble `a+b`, a server, a grader, or a Python function. A new kind implements `Scorer` and gets an entry there.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from rm_gallery.core.graders import BaseGrader
from rm_gallery.core.graders.base_grader import GraderError, GraderRank, GraderScore
from rm_gallery.core.run_sync import run_sync
from rm_gallery.data.tokenization.template_date import read_date
from rm_gallery.errors import BadRow, UserError, nearest
from rm_gallery.schema import InputStyle, Message, PreferenceGroup
from rm_gallery.scoring.ensemble import EnsembleScorer, Reduction, members_of, shared_scale
from rm_gallery.scoring.remote import names_servers, open_servers, short_name

if TYPE_CHECKING:
    from rm_gallery.modeling.export import InputRecord
    from rm_gallery.scoring import RemoteScorer, RewardScorer
    from rm_gallery.scoring.base import BaseScorer

log = logging.getLogger(__name__)

Rewards: TypeAlias = list[list[float] | Exception]
"""Of each group: one reward per response in the order of the group, or why the group has none."""
RewardFunction: TypeAlias = Callable[[list[list[Message]]], Sequence[float]]
"""A Python function from conversations, which end with the response, to one reward each."""

_GRADER = "grader:"
_MAX_REQUESTS = 16  # of a grader at a time
MAX_MERGED = 64
"""Responses of a merged group."""


class Scorer(Protocol):
    """Gives responses rewards."""

    name: str
    """In tables, unique in a command."""
    source: str
    """What it was opened from: a folder, a name, or the name of a function."""
    kind: str
    """`model`, `server`, `ensemble`, `grader` or `function`."""

    @property
    def style(self) -> InputStyle:
        """How rows are read: `text` for a model that was trained on raw text."""
        ...

    def score(self, groups: Sequence[PreferenceGroup]) -> Rewards:
        """Rewards of each group. A group that cannot be scored does not affect the others."""
        ...

    def close(self) -> None:
        """Free what the scorer holds."""
        ...


@dataclass(frozen=True)
class ScorerOptions:
    """How models are loaded; see `RewardScorer.from_folder`."""

    device: str = "auto"
    dtype: str = "auto"
    token_budget: int | None = None
    trust_remote_code: bool = False
    base: str | None = None
    quantized: bool = True
    template_date: str | None = None
    tokenizer: str | None = None
    """Of servers; see `RemoteScorer`."""
    ensemble: str = "mean"
    """How the rewards of an ensemble `a+b` become one; see `RewardScorer.from_folders`."""
    normalize: bool | None = None
    """Of ensembles alone; see `RewardScorer.from_folders`."""
    weights: Mapping[str, float] | None = None
    """Of the attributes of models that have some; see `RewardScorer.from_folder`."""


@dataclass
class ModelScorer:
    """A reward model in this process or behind a server, or an ensemble of these."""

    scorer: BaseScorer
    name: str
    source: str
    kind: str = "model"
    owns: bool = True
    """Whether `close` closes the scorer: not one that the caller made."""

    @property
    def style(self) -> InputStyle:
        return self.scorer.inputs.style

    def score(self, groups: Sequence[PreferenceGroup]) -> Rewards:
        from rm_gallery.scoring.base import NonFiniteReward

        fitted: list[PreferenceGroup] = []
        results: Rewards = []
        for group in groups:
            try:
                fitted.append(self.scorer.inputs.fit(group))
                results.append([])
            except UserError as error:
                results.append(BadRow(str(error)))
        found = iter(score_merged(self.scorer.score_each, fitted))
        for index, group in enumerate(groups):
            if not isinstance(results[index], Exception):
                results[index] = next(found)
            if isinstance(results[index], NonFiniteReward):
                checked([math.nan], f"model={self.name}", group)
        return results

    def close(self) -> None:
        if self.owns:
            self.scorer.close()


@dataclass
class FunctionScorer:
    """A Python function as a reward model."""

    function: RewardFunction
    name: str
    source: str
    kind: str = "function"
    style: InputStyle = "chat"

    def score(self, groups: Sequence[PreferenceGroup]) -> Rewards:
        conversations = [[*_turns(group.prompt), *_turns(response)] for group in groups for response in group.responses]
        found = list(self.function(conversations)) if conversations else []
        if len(found) != len(conversations):
            raise UserError(
                f"model={self.name}: the function returned {len(found)} rewards for {len(conversations)} conversations"
            )
        rewards = iter(found)
        return [
            checked([float(next(rewards)) for _ in group.responses], f"model={self.name}", group) for group in groups
        ]

    def close(self) -> None:
        pass


@dataclass
class GraderScorer:
    """A grader, with a chat model behind an API or a reward model. A rank counts as a reward, the best rank highest."""

    grader: BaseGrader
    name: str
    source: str
    kind: str = "grader"
    style: InputStyle = "chat"

    def score(self, groups: Sequence[PreferenceGroup]) -> Rewards:
        return run_sync(self._score(groups))

    async def _score(self, groups: Sequence[PreferenceGroup]) -> Rewards:
        limit = asyncio.Semaphore(_MAX_REQUESTS)

        async def grade(group: PreferenceGroup) -> list[float] | Exception:
            async with limit:
                result = await self.grader.aevaluate(
                    query=_query(group.prompt),
                    response=[_query(response) for response in group.responses],
                    **({"tools": group.metadata["tools"]} if group.metadata.get("tools") else {}),
                )
            return self._rewards(result, group)

        return list(await asyncio.gather(*map(grade, groups)))

    def _rewards(
        self, result: GraderScore | GraderRank | GraderError, group: PreferenceGroup
    ) -> list[float] | Exception:
        if isinstance(result, GraderError):
            return BadRow(f"grader error: {result.error}")
        if isinstance(result, GraderScore):
            found = [result.score]
        else:
            found = result.metadata.get("rewards") or result.metadata.get("scores") or [-rank for rank in result.rank]
        if len(found) != len(group.responses):
            return BadRow(f"grader with {len(found)} results for {len(group.responses)} responses")
        return checked([float(value) for value in found], f"model={self.name}", group)

    def close(self) -> None:
        pass


def _turns(part: str | Sequence[Message | str]) -> list[Message]:
    """Messages; a raw text is one assistant turn, as a row without a prompt has it."""
    if isinstance(part, str):
        return [{"role": "assistant", "content": part}] if part else []
    return [dict(each) for each in part if not isinstance(each, str)]


def _query(part: str | Sequence[Message]) -> Any:
    """Messages for a grader: text where there is only one."""
    if isinstance(part, str):
        return part
    return part[0].get("content") or "" if len(part) == 1 else list(part)


class NotFinite(UserError):
    """A reward that is not a finite number, which ends an evaluation."""


def checked(rewards: list[float], what: str, group: PreferenceGroup) -> list[float]:
    """The rewards. Raises NotFinite, with the place of the row, if one is not finite."""
    bad = next((value for value in rewards if not math.isfinite(value)), None)
    if bad is not None:
        raise NotFinite(
            f"{group.where or 'a row'}: {what} gives the reward {bad}, which is not finite; check the model's "
            "weights and dtype"
        )
    return rewards


def score_merged(score: Callable[[Sequence[PreferenceGroup]], Rewards], groups: Sequence[PreferenceGroup]) -> Rewards:
    """Rewards of groups, with each prompt computed once for all groups that have it, and each response once.

    A reward depends on its own text alone, so merging changes the cost and nothing else. When a merged group cannot be
    scored, its groups are scored one by one, so that only the one at fault has none.
    """
    merged: list[PreferenceGroup] = []
    places: list[tuple[int, list[int]]] = []
    open_groups: dict[str, int] = {}
    known: list[dict[str, int]] = []
    for group in groups:
        key = repr((group.style, group.prompt, group.metadata))
        texts = [repr(response) for response in group.responses]
        number = open_groups.get(key) if group.prompt else None
        if number is None or len(known[number].keys() | set(texts)) > MAX_MERGED:
            number = open_groups[key] = len(merged)
            merged.append(replace(group, responses=[], comparisons=()))
            known.append({})
        indices = known[number]
        for text, response in zip(texts, group.responses, strict=True):
            if text not in indices:
                indices[text] = len(indices)
                merged[number].responses.append(response)  # type: ignore[attr-defined]  # a list, made above
        places.append((number, [indices[text] for text in texts]))
    found = score(merged)
    failed = [index for index, (number, _) in enumerate(places) if isinstance(found[number], Exception)]
    again = dict(zip(failed, score([groups[index] for index in failed]), strict=True)) if failed else {}
    results: Rewards = []
    for index, (number, members) in enumerate(places):
        rewards = again[index] if index in again else found[number]
        if isinstance(rewards, Exception) or index in again:
            results.append(rewards)
        else:
            results.append([rewards[member] for member in members])
    return results


def open_scorer(model: Any, name: str, options: ScorerOptions) -> Scorer:
    """The scorer of one of the values of `check_models`: a folder, a tuple of these, an object or a function.

    Raises UserError for anything else, and for a model that cannot be loaded.
    """
    if callable(getattr(model, "score_each", None)) and hasattr(
        model, "inputs"
    ):  # a RewardScorer; torch stays unloaded
        kind = "server" if isinstance(getattr(model, "protocol", None), str) else "model"
        return ModelScorer(model, name, model.folder, kind, owns=False)
    if isinstance(model, BaseGrader):
        return GraderScorer(model, name, repr(model))
    if isinstance(model, tuple):
        ensemble = _load_ensemble(model, options)
        return ModelScorer(ensemble, name, ensemble.folder, "ensemble")
    if isinstance(model, str) and names_servers(model):
        return ModelScorer(_connect(model, options), name, model, "server")
    if isinstance(model, str):
        return ModelScorer(_load(model, options), name, model)
    if callable(model):
        return FunctionScorer(model, name, getattr(model, "__qualname__", type(model).__name__))
    raise UserError(
        f"model is a {type(model).__name__}; pass a model folder, a RewardScorer, a grader, or a function from a list "
        "of conversations to a list of rewards"
    )


def check_models(models: Sequence[Any], options: ScorerOptions) -> list[Any]:
    """The models with runs resolved to checkpoints and ensembles to tuples, for `open_scorer`.

    Raises UserError for a model that cannot be loaded, before the first one is evaluated.
    """
    found: list[Any] = []
    for model in models:
        if not isinstance(model, str | Path) or str(model).startswith(_GRADER):
            found.append(_make_grader(str(model)) if isinstance(model, str) else model)
            continue
        folders = [_check_folder(part, options) for part in members_of(str(model))]
        found.append(folders[0] if len(folders) == 1 else tuple(folders))
    ensembles = [each for each in found if isinstance(each, tuple)]
    if options.normalize is not None and not ensembles:
        raise UserError("--normalize is for ensembles, and none is named (--model A+B, or --ensemble); remove it")
    Reduction(options.ensemble, key="--ensemble")
    if options.normalize:
        for each in ensembles:
            shared_scale(each, True)
    parts = [part for each in found for part in (each if isinstance(each, tuple) else [each])]
    _check_weights([part for part in parts if isinstance(part, str) and not names_servers(part)], options)
    if options.tokenizer is not None and not any(isinstance(part, str) and names_servers(part) for part in parts):
        raise UserError(
            f"--tokenizer={options.tokenizer}: it is for models behind servers, and none is named; remove it"
        )
    return found


def _check_weights(folders: Sequence[str], options: ScorerOptions) -> None:
    """Raise UserError for weights of attributes that a model does not have, or that no model has."""
    if options.weights is None:
        return
    from rm_gallery.scoring.engine import find_weights

    records = {folder: record for folder in folders if (record := _record_of(folder)) and record.attributes}
    if not records:
        raise UserError("weights are for models with attributes, and none is named; remove them (--weights)")
    for folder, record in records.items():
        try:
            find_weights(record, options.weights)
        except UserError as error:
            raise UserError(f"--weights: model={folder}: {error}") from error


def _record_of(folder: str) -> InputRecord | None:
    from rm_gallery.modeling.export import read_record
    from rm_gallery.scoring.model_folder import file_of

    config = file_of(folder, "config.json")
    return None if config is None else read_record(config.parent)


def with_ensemble(models: Sequence[str]) -> list[str]:
    """The models of `--ensemble`: as named if one is an ensemble `A+B`, else followed by that of all of them."""
    if any(len(members_of(model)) > 1 for model in models):
        return list(models)
    if len(models) < 2:
        raise UserError("--ensemble needs an ensemble: give --model more than once, or --model A+B")
    return [*models, "+".join(models)]


def _check_folder(model: str, options: ScorerOptions) -> str:
    """The checkpoint of a folder; a server as it is."""
    if names_servers(model):
        _connect(model, options).close()
        return model
    from rm_gallery.scoring.loading import check_folder, find_device, find_dtype
    from rm_gallery.scoring.model_folder import choose_checkpoint

    if options.template_date is not None:
        read_date(options.template_date, "--template-date")
    find_dtype(options.dtype, find_device(options.device))
    folder = choose_checkpoint(model, key="model")
    check_folder(folder, trust_remote_code=options.trust_remote_code, base=options.base)
    return folder


def _load_ensemble(models: Sequence[str], options: ScorerOptions) -> EnsembleScorer:
    scale = shared_scale(models, options.normalize, options.weights)
    members: list[BaseScorer] = [
        _connect(each, options) if names_servers(each) else _load(each, options, normalize=scale is not None)
        for each in models
    ]
    return EnsembleScorer(members, reduce=options.ensemble, names=name_scorers(models))


def _load(folder: str, options: ScorerOptions, *, normalize: bool = False) -> RewardScorer:
    from rm_gallery.scoring.scorer import RewardScorer

    return RewardScorer.from_folder(
        folder,
        device=options.device,
        dtype=options.dtype,  # type: ignore[arg-type]  # checked there
        token_budget=options.token_budget,
        trust_remote_code=options.trust_remote_code,
        template_date=options.template_date,
        base=options.base,
        quantized=options.quantized,
        normalize=normalize,
        weights=options.weights if (record := _record_of(folder)) and record.attributes else None,
    )


def _connect(model: str, options: ScorerOptions) -> RemoteScorer:
    return open_servers(model, tokenizer=options.tokenizer, template_date=options.template_date)


def _make_grader(text: str) -> BaseGrader:
    """`grader:NAME:MODEL`: a built-in grader with a chat model behind an API."""
    from rm_gallery.core.graders import common
    from rm_gallery.core.models import OpenAIChatModel

    name, _, model = text.removeprefix(_GRADER).partition(":")
    known = {
        each.removesuffix("Grader").lower(): getattr(common, each) for each in dir(common) if each.endswith("Grader")
    }
    found = known.get(name.replace("_", "").lower())
    if found is None or not model:
        hint = nearest(name.lower(), known) if found is None else ""
        raise UserError(f"model={text}: must be grader:NAME:MODEL with NAME one of {', '.join(sorted(known))}.{hint}")
    return found(model=OpenAIChatModel(model=model))


def name_scorers(models: Sequence[Any]) -> list[str]:
    """Short unique names: the last parts of folders as in `rm-gallery score`, names of graders and functions."""
    from rm_gallery.scoring.jobs import name_models

    paths = [str(each) for each in models if isinstance(each, str | Path)]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise UserError(f"model={twice} is named twice; name it once")
    members = {
        str(each): members_of(str(each))
        for each in models
        if isinstance(each, str | Path) and not str(each).startswith(_GRADER)
    }
    parts = list(dict.fromkeys(part for parts in members.values() for part in parts))
    folders = [part for part in parts if not names_servers(part)]
    short = dict(zip(folders, name_models(folders), strict=True)) if folders else {}
    short |= {part: short_name(part) for part in parts if part not in short}
    names: list[str] = []
    for model in models:
        if isinstance(model, str | Path):
            name = "+".join(short[part] for part in members.get(str(model), ())) or str(model)
        elif isinstance(model, BaseGrader):
            name = model.name
        else:
            folder = getattr(model, "folder", "") or getattr(model, "__name__", "") or type(model).__name__
            name = Path(folder).name
        while name in names:
            name += "'"
        names.append(name)
    return names
