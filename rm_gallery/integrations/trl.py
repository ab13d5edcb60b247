"""A reward function for TRL's GRPOTrainer, RLOOTrainer and other trainers with `reward_funcs`. Does not need TRL."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from rm_gallery.errors import UserError
from rm_gallery.integrations.scorers import Sample, open_scorer, score_samples
from rm_gallery.scoring.base import BaseScorer

log = logging.getLogger(__name__)


def reward_function(
    source: Any, *, name: str | None = None, invalid_reward: float | None = None, **settings: Any
) -> RewardFunction:
    """A function for `reward_funcs` with the rewards of a folder, an ensemble `A+B`, a server or a scorer.

    Texts are tokenized as in training, for decoders and encoders. name: in TRL's logs; by default `reward_model`.
    invalid_reward: of a completion that cannot be scored, such as one with more tokens than the model has positions;
    None raises an error, since TRL counts a missing reward as 0, as does a call in which no completion can be scored.
    settings: see `open_scorer`.

    The model is loaded at the first call, on the device of the process (`device=` for another one).
    """
    return RewardFunction(source, name or "reward_model", invalid_reward, settings)


class RewardFunction:
    """See `reward_function`. Thread-safe; a pickle loads the model again."""

    def __init__(self, source: Any, name: str, invalid_reward: float | None, settings: dict[str, Any]) -> None:
        self.__name__ = name
        self._source, self._invalid_reward, self._settings = source, invalid_reward, settings
        self._scorer: BaseScorer | None = None
        self._lock = threading.Lock()

    @property
    def scorer(self) -> BaseScorer:
        """The scorer, loaded when it is first needed."""
        with self._lock:
            if self._scorer is None:
                self._scorer = open_scorer(self._source, **self._settings)
            return self._scorer

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        tools: Any = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """One reward per completion.

        prompts, completions: texts or messages, as TRL has them. tools: a column of the dataset, one value per sample.
        log_metric: of TRL. columns: other columns of the dataset and fields of the trainer, which are not used.
        """
        spread = tools if isinstance(tools, list) and len(tools) == len(prompts) else [tools] * len(prompts)
        samples = [Sample(*each) for each in zip(prompts, completions, spread, strict=True)]
        found = score_samples(self.scorer, samples)
        invalid = [(index, each) for index, each in enumerate(found) if isinstance(each, Exception)]
        if invalid:
            self._check(invalid, len(found))
            log.warning("%s: %d completions cannot be scored (first: %s)", self.__name__, len(invalid), invalid[0][1])
        if log_metric is not None and self._invalid_reward is not None:
            log_metric(f"{self.__name__}/invalid", len(invalid) / max(len(found), 1))
        return [float(self._invalid_reward or 0.0) if isinstance(each, Exception) else each for each in found]

    def _check(self, invalid: Sequence[tuple[int, Exception]], count: int) -> None:
        """Raise the first error, unless completions that cannot be scored have a reward and others can be scored."""
        index, error = invalid[0]
        if not isinstance(error, ValueError):
            raise error
        if self._invalid_reward is None or len(invalid) == count > 1:
            hint = "set invalid_reward to the reward of such completions" if len(invalid) < count else "none can be"
            raise UserError(f"{self.__name__}: completion {index} cannot be scored: {error}; {hint}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return RewardFunction, (self._source, self.__name__, self._invalid_reward, self._settings)
