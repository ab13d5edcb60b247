"""RewardScorer: rewards from a checkpoint folder, with the tokenization, packing and attention of training."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rm_gallery.errors import UserError
from rm_gallery.modeling.export import InputRecord
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring import forks
from rm_gallery.scoring.base import BaseScorer, Rewards, find_bad_reward, raise_first
from rm_gallery.scoring.batcher import Batcher
from rm_gallery.scoring.engine import Encoded, Engine, columns_of
from rm_gallery.scoring.ensemble import EnsembleScorer, shared_scale
from rm_gallery.scoring.inputs import InputBuilder
from rm_gallery.scoring.jobs import name_models
from rm_gallery.scoring.loading import ScoringModel, load_folder
from rm_gallery.scoring.model_folder import Stats, choose_checkpoint, stats_of


class RewardScorer(BaseScorer):
    """Scores responses with a trained model; the prompt of several responses is computed once.

    A reward depends only on its own text, not on the other texts of the call or their order. Thread-safe. The async
    methods return the same rewards; concurrent calls share forward passes. A forked process can use the scorer of its
    parent on a CPU; a pickle of a scorer from a folder loads it again.
    """

    def __init__(
        self, source: ScoringModel, *, token_budget: int | None = None, normalize: bool = False,
        weights: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        """source: from `load_folder`. token_budget: maximum tokens of a model call; None depends on the device.

        normalize, weights: see `from_folder`.
        """
        self.folder = ""
        """Folder of the model; identifies the scorer when grading resumes."""
        self.reward_form = f"{normalize} {weights}" if normalize or weights else ""
        """How rewards differ from those of the folder; identifies the scorer too."""
        self._origin: tuple[dict[str, Any], Stats] | None = None
        self.engine = Engine(source, token_budget=token_budget, normalize=normalize, weights=weights)
        self.attributes = columns_of(source.record)
        reads_tools = "tools" in str(source.tokenizer.chat_template)
        self.inputs = InputBuilder(source.record.input_style, source.record.separator, reads_tools=reads_tools)
        self._batcher = Batcher(self.engine)
        # Runs when this scorer is garbage-collected, and before threads end at interpreter exit.
        self._finalizer = weakref.finalize(self, self._batcher.close)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        device: str = "auto",
        dtype: Literal["auto", "fp32", "bf16"] = "auto",
        token_budget: int | None = None,
        trust_remote_code: bool = False,
        template_date: str | None = None,
        base: str | None = None,
        normalize: bool = False,
        quantized: bool = True,
        weights: Mapping[str, float] | None = None,
    ) -> RewardScorer:
        """Load a checkpoint folder of RM-Gallery, or any sequence classification model or adapter with one label.

        folder: of the model; or of a run, for the best checkpoint if best.json names one, else the newest complete one
        (logged). device: `auto` uses a GPU if there is one. dtype: `auto` is bfloat16 on a GPU that supports it, else
        float32; the reward head of packed architectures stays float32. On a CPU, freed memory is kept for the next
        call (see `keep_freed_memory`). template_date: date (YYYY-MM-DD) for a chat template that writes today's.
        base: folder or hub name of an adapter's base model, if it is not the one that adapter_config.json names.
        quantized: quantize the base model of an adapter as in training, if it was (QLoRA); see `load_folder`.
        normalize: return (reward - mean) / standard deviation, with those of the validation responses that the folder
        has. weights: by name, of a model with attributes (`model.attributes`), whose reward is their weighted sum; by
        default those of its folder. Raises UserError for a folder without such a model or without these figures, and
        for weights that are not finite.
        """
        folder = choose_checkpoint(str(folder), key="model")
        settings: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        settings |= {"base": base, "quantized": quantized}
        is_here = Path(folder).expanduser().is_dir()
        where = str(Path(folder).expanduser().resolve()) if is_here else str(folder)
        origin = (
            {"folder": where, "token_budget": token_budget, "normalize": normalize, "weights": weights, **settings},
            stats_of(folder),
        )
        forks.compute_in_fork()
        source = load_folder(folder, **settings, template_date=template_date)
        origin[0]["template_date"] = source.template_date
        scorer = cls(source, token_budget=token_budget, normalize=normalize, weights=weights)
        scorer.folder, scorer._origin = str(folder), origin
        return scorer

    @classmethod
    def from_folders(
        cls, folders: Sequence[str | Path], *, reduce: str = "mean", normalize: bool | None = None, **loading: Any
    ) -> EnsembleScorer:
        """Load several models as one ensemble, a scorer with the same methods; all are in memory.

        reduce: how their rewards become one: `mean`, `lower` (mean - std over the members; `lower:K` for mean - K std)
        or `min`. normalize: rewards of different runs have different scales, so each is normalized by its validation
        rewards (see `from_folder`) before they are combined. None does so if every folder has these figures, else it
        warns; True requires them, and False combines rewards as they are. loading: other arguments of `from_folder`.

        Raises UserError as `from_folder`, for a folder that is named twice, and for models that do not read the same
        texts (raw text and chats).
        """
        models = [choose_checkpoint(str(folder), key="model") for folder in folders]
        names = name_models(models)
        scale = shared_scale(models, normalize, loading.get("weights"))
        members = [cls.from_folder(model, normalize=scale is not None, **loading) for model in models]
        return EnsembleScorer(members, reduce=reduce, names=names)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies hold the folder and the settings; the copy loads the model again."""
        if self._origin is None:
            raise TypeError(
                "a RewardScorer of a model in memory cannot be pickled or copied; make it with RewardScorer.from_folder"
            )
        return _load_again, (*self._origin, self.folder)

    @property
    def record(self) -> InputRecord:
        """The input format of training."""
        return self.engine.record

    def score(self, groups: Sequence[PreferenceGroup]) -> Rewards:
        """One list of K rewards per group, in the order of its responses.

        Raises UserError for a text without tokens, with more tokens than the model has positions, for a conversation
        that the chat template rejects, and for a reward that is not finite.
        """
        groups = self.fitted(groups)
        encoded = self.engine.encode(groups)
        raise_first(encoded, groups)
        return raise_first(self._run(encoded), groups)

    def score_each(self, groups: Sequence[PreferenceGroup], *, attributes: bool = False) -> list[list[Any] | Exception]:
        """Like `score`, with an exception in place of the rewards of a group that cannot be scored.

        attributes: in place of each reward a list of it and the model's attributes.
        """
        return self._run(self.engine.encode(self.fitted(groups)), attributes and bool(self.attributes))

    def score_rendered(self, texts: Sequence[str]) -> list[float]:
        """Rewards of whole texts that hold all their special tokens, as a chat template writes them.

        Such texts come from other programs; `score_messages` renders as in training. Raises UserError as `score`.
        """
        encoded = self.engine.encode_rendered(texts)
        groups = [PreferenceGroup("", [text], style="text") for text in texts]
        raise_first(encoded, groups)
        return [reward for [reward] in raise_first(self._run(encoded), groups)]

    def _run(self, encoded: Sequence[Encoded], attributes: bool = False) -> list[list[Any] | Exception]:
        parts = [part for each in encoded if not isinstance(each, Exception) for part in each]
        found: list[list[Any]] = [[]] * len(parts)
        for pack in self.engine.plan(parts):
            for index, rewards in zip(
                pack, self.engine.run([parts[index] for index in pack], attributes=attributes), strict=True
            ):
                found[index] = rewards
        ordered = iter(found)
        results: list[list[Any] | Exception] = []
        for each in encoded:
            if isinstance(each, Exception):
                results.append(each)
            else:
                rewards = [reward for _ in each for reward in next(ordered)]
                results.append(find_bad_reward(rewards) or rewards)
        return results

    async def ascore(self, groups: Sequence[PreferenceGroup]) -> Rewards:
        """Like `score`; concurrent calls from any tasks, event loops and threads share forward passes.

        Raises RuntimeError after `close`.
        """
        return await asyncio.wrap_future(self._batcher.submit(self.fitted(groups)))

    def close(self) -> None:
        """Stop the worker thread of the async methods, if it runs; other methods still work. Idempotent."""
        self._finalizer()


def _load_again(settings: dict[str, Any], stats: Stats, folder: str) -> RewardScorer:
    """The copy of a scorer that was pickled."""
    if stats_of(settings["folder"]) != stats:
        raise UserError(
            f"model={folder}: the folder changed after the scorer was loaded, so a copy would give other rewards; "
            "load it with RewardScorer.from_folder"
        )
    scorer = RewardScorer.from_folder(**settings)
    scorer.folder = folder
    return scorer
