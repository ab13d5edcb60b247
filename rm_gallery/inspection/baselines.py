"""Baselines: how many pairs can be told apart by length or by single words alone, so what a model has to beat.

Five-fold cross-validation grouped by prompt. Bag of words: logistic regression on the difference of the responses'
tf-idf vectors (words and word pairs, hashed) and the logarithm of their length ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from rm_gallery.inspection.duplicates import CONSTANT_SHARE
from rm_gallery.inspection.views import WORD_PATTERN
from rm_gallery.sampling import Reservoir

# P sampled pairs, F features

MAX_PAIRS = 20_000
MAX_CHARS = 4_000
"""Characters of a response that the words are taken from; lengths are always the whole ones."""
FOLDS = 5
MIN_PAIRS = 100
_FEATURES = 2**18
_INVERSE_REGULARIZATION = 3.0


@dataclass(frozen=True, slots=True)
class SampledPair:
    """A pair in the sample that baselines learn from."""

    prompt: int
    """Hash of the prompt."""
    better: str
    worse: str
    log_ratio: float
    """Of the lengths in characters, better over worse; 0 for a tie."""


def sampled_pair(prompt: int, better: str, worse: str) -> SampledPair:
    """Cut to what the baselines look at."""
    ratio = math.log(max(1, len(better)) / max(1, len(worse)))
    return SampledPair(prompt, better[:MAX_CHARS], worse[:MAX_CHARS], ratio)


@dataclass(frozen=True)
class Baseline:
    """Accuracy of one rule that is no reward model."""

    key: str
    title: str
    on: str
    """Which pairs were asked about: `training` (cross-validated) or `validation`."""
    accuracy: float
    """A tie counts half."""
    standard_error: float
    """Pairs of the same prompt count as one observation."""
    num_pairs: int
    why: str


@dataclass(frozen=True)
class BaselineReport:
    """What was learned, on what, or why not."""

    baselines: tuple[Baseline, ...]
    notes: tuple[str, ...]


def baseline_report(train: Reservoir[SampledPair], val: Reservoir[SampledPair] | None, *, seed: int) -> BaselineReport:
    """Cross-validated on the training side, and from there to the validation side if there is one."""
    pairs = train.in_order()
    notes = []
    if train.num_offered > len(pairs):
        notes.append(f"learned from {len(pairs):,} pairs drawn at random of {train.num_offered:,}")
    if len(pairs) < MIN_PAIRS:
        return BaselineReport((), (f"too few pairs for baselines: {len(pairs)}, at least {MIN_PAIRS} are needed",))
    prompts = np.array([pair.prompt for pair in pairs], np.uint64)
    groups, by_prompt = _groups(prompts)
    if by_prompt:
        notes.append("split by prompt: all pairs of a prompt are on the same side")
    else:
        notes.append("one prompt stands in most pairs, so they were split pair by pair")
    has_words = find_spec("sklearn") is not None
    if not has_words:
        notes.append("the bag of words needs scikit-learn: pip install 'rm-gallery[data]'")
    ratios = np.array([pair.log_ratio for pair in pairs])
    folds = np.random.default_rng([seed, 5]).permutation(int(groups.max()) + 1)[groups] % FOLDS
    length = np.concatenate([_by_length(ratios[folds != fold], ratios[folds == fold]) for fold in range(FOLDS)])
    grouped = np.concatenate([groups[folds == fold] for fold in range(FOLDS)])
    found = [_baseline("length", length, grouped)]
    words = _Words(pairs) if has_words else None
    if words is not None:
        right = [words.train(folds != fold, seed).right(words, folds == fold) for fold in range(FOLDS)]
        found.append(_baseline("words", np.concatenate(right), grouped))
    if val is not None and val.items:
        found += _from_train_to_val(ratios, words, val.in_order(), seed)
        if val.num_offered > len(val.items):
            notes.append(f"measured on {len(val.items):,} validation pairs of {val.num_offered:,}")
    return BaselineReport(tuple(found), tuple(notes))


_RULES = {
    "length": ("length alone", "always prefers the longer, or always the shorter, response"),
    "words": (
        "bag of words",
        "knows which words and word pairs stand in chosen rather than in rejected, and the lengths; sees no prompt",
    ),
}


def _groups(prompts: np.ndarray) -> tuple[np.ndarray, bool]:
    """[P] which pairs must stay together, and whether that goes by prompt."""
    _, groups, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    if len(counts) < 2 * FOLDS or counts.max() > CONSTANT_SHARE * len(prompts):
        return np.arange(len(prompts)), False
    return groups, True


def _by_length(known: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """1 for a right answer, 0.5 for a tie; the direction comes from the known pairs."""
    direction = 1.0 if np.sign(known).sum() >= 0 else -1.0
    return 0.5 + 0.5 * np.sign(direction * asked)


def _baseline(key: str, right: np.ndarray, groups: np.ndarray, *, on: str = "training") -> Baseline:
    accuracy = float(right.mean())
    sums = np.bincount(np.unique(groups, return_inverse=True)[1], weights=right - accuracy)
    title, why = _RULES[key]
    return Baseline(key, title, on, accuracy, float(math.sqrt((sums**2).sum()) / len(right)), len(right), why)


def _from_train_to_val(
    ratios: np.ndarray, words: _Words | None, val: Sequence[SampledPair], seed: int
) -> list[Baseline]:
    groups, _ = _groups(np.array([pair.prompt for pair in val], np.uint64))
    right = _by_length(ratios, np.array([pair.log_ratio for pair in val]))
    found = [_baseline("length", right, groups, on="validation")]
    if words is not None:
        model = words.train(np.ones(len(ratios), bool), seed)
        right = model.right(words.also(val), np.ones(len(val), bool))
        found.append(_baseline("words", right, groups, on="validation"))
    return found


class _Words:
    """Features of pairs: tf-idf difference and log length ratio."""

    def __init__(self, pairs: Sequence[SampledPair], weighting: Any = None) -> None:
        from scipy import sparse
        from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

        vectorizer = HashingVectorizer(
            n_features=_FEATURES, alternate_sign=False, norm=None, ngram_range=(1, 2), token_pattern=WORD_PATTERN,
            dtype=np.float32,
        )  # fmt: skip
        texts = [_clean(pair.better) for pair in pairs] + [_clean(pair.worse) for pair in pairs]
        counts = vectorizer.transform(texts)
        self._weighting = weighting or TfidfTransformer(sublinear_tf=True).fit(counts)
        weighted = self._weighting.transform(counts)
        ratios = sparse.csr_matrix(np.array([[pair.log_ratio] for pair in pairs], np.float32))
        self.features = sparse.hstack([weighted[: len(pairs)] - weighted[len(pairs) :], ratios], format="csr")

    def also(self, pairs: Sequence[SampledPair]) -> _Words:
        """Features of other pairs under the same weights of words."""
        return _Words(pairs, self._weighting)

    def train(self, mask: np.ndarray, seed: int) -> _Linear:
        """Half of the pairs turned round, so that both answers occur."""
        from scipy import sparse
        from sklearn.linear_model import LogisticRegression

        chosen = self.features[np.flatnonzero(mask)]
        sign = np.where(np.random.default_rng([seed, 6]).random(chosen.shape[0]) < 0.5, 1.0, -1.0)
        model = LogisticRegression(
            C=_INVERSE_REGULARIZATION, fit_intercept=False, solver="liblinear", random_state=seed, max_iter=200
        )
        model.fit(sparse.diags(sign) @ chosen, sign)
        return _Linear(model.coef_[0])


@dataclass(frozen=True)
class _Linear:
    weights: np.ndarray
    """[F] float64."""

    def right(self, words: _Words, mask: np.ndarray) -> np.ndarray:
        """1 for each pair whose better response gets more, 0.5 for a tie."""
        return 0.5 + 0.5 * np.sign(words.features[np.flatnonzero(mask)] @ self.weights)


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
