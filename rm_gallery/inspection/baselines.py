"""Baselines: accuracy of length and of a bag of words, which a reward model should beat.

Five-fold cross-validation grouped by prompt. Bag of words: logistic regression on the difference of the responses'
tf-idf vectors (hashed unigrams and bigrams) and the logarithm of their length ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from rm_gallery.inspection.texts import WORD_PATTERN
from rm_gallery.sampling import Reservoir

# P sampled pairs, F features

MAX_PAIRS = 20_000
MAX_CHARS = 4_000
"""Characters of a response that the bag of words reads; lengths are those of the whole text."""
CONSTANT_SHARE = 0.5
"""A prompt of more than this share of the rows is a constant instruction: no leak, and not a group of a fold."""
FOLDS = 5
MIN_PAIRS = 100
_FEATURES = 2**18
_INVERSE_REGULARIZATION = 3.0


@dataclass(frozen=True, slots=True)
class SampledPair:
    """A pair that baselines are fitted or evaluated on."""

    prompt: int
    """Hash of the prompt."""
    better: str
    worse: str
    log_ratio: float
    """Log of the length ratio in characters, better over worse; 0 for a tie."""


def sampled_pair(prompt: int, better: str, worse: str) -> SampledPair:
    """The pair with texts truncated to what the baselines read."""
    ratio = math.log(max(1, len(better)) / max(1, len(worse)))
    return SampledPair(prompt, better[:MAX_CHARS], worse[:MAX_CHARS], ratio)


@dataclass(frozen=True)
class Baseline:
    """Accuracy of one baseline on one split."""

    key: str
    title: str
    on: str
    """Evaluated on: `training` (cross-validated) or `validation`."""
    accuracy: float
    """A tie counts half."""
    standard_error: float
    """Clustered by prompt."""
    num_pairs: int
    why: str


@dataclass(frozen=True)
class BaselineReport:
    """The baselines, and notes on how they were fitted, or why they were not."""

    baselines: tuple[Baseline, ...]
    notes: tuple[str, ...]
    by_prompt: bool = False
    """Whether folds hold whole prompts; otherwise responses that are in several pairs may be in several folds."""


def baseline_report(train: Reservoir[SampledPair], val: Reservoir[SampledPair] | None, *, seed: int) -> BaselineReport:
    """Cross-validated on the training pairs; with validation pairs, also fitted on training and evaluated on those."""
    pairs = train.in_order()
    notes = []
    if train.num_offered > len(pairs):
        notes.append(f"fitted on a random sample of {len(pairs):,} of {train.num_offered:,} training pairs")
    if len(pairs) < MIN_PAIRS:
        return BaselineReport((), (f"{len(pairs)} pairs are too few for baselines; at least {MIN_PAIRS} are needed",))
    prompts = np.array([pair.prompt for pair in pairs], np.uint64)
    groups, by_prompt = _groups(prompts)
    if by_prompt:
        notes.append("five-fold cross-validation, grouped by prompt")
    else:
        notes.append("five-fold cross-validation by pair, since most pairs have the same prompt")
    has_words = find_spec("sklearn") is not None
    if not has_words:
        notes.append("the bag of words requires scikit-learn: pip install 'rm-gallery[data]'")
    ratios = np.array([pair.log_ratio for pair in pairs])
    folds = np.random.default_rng([seed, 5]).permutation(int(groups.max()) + 1)[groups] % FOLDS
    length = np.concatenate([_by_length(ratios[folds != fold], ratios[folds == fold]) for fold in range(FOLDS)])
    grouped = np.concatenate([groups[folds == fold] for fold in range(FOLDS)])
    found = [_baseline("length", length, grouped)]
    words = _Features(pairs) if has_words else None
    if words is not None:
        correct = [words.correct(words.fit(folds != fold, seed), folds == fold) for fold in range(FOLDS)]
        found.append(_baseline("words", np.concatenate(correct), grouped))
    if val is not None and val.items:
        found += _from_train_to_val(ratios, words, val.in_order(), seed)
        if val.num_offered > len(val.items):
            notes.append(f"evaluated on a random sample of {len(val.items):,} of {val.num_offered:,} validation pairs")
    return BaselineReport(tuple(found), tuple(notes), by_prompt)


_RULES = {
    "length": ("length", "always prefers the longer response, or always the shorter"),
    "words": ("bag of words", "logistic regression on tf-idf of unigrams and bigrams and on length; no prompt"),
}


def _groups(prompts: np.ndarray) -> tuple[np.ndarray, bool]:
    """[P] fold group of each pair, and whether groups are prompts."""
    _, groups, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    if len(counts) < FOLDS or counts.max() > CONSTANT_SHARE * len(prompts):
        return np.arange(len(prompts)), False
    return groups, True


def _by_length(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """1 for each correct test pair, 0.5 for a tie. The direction is fitted on the training pairs."""
    direction = 1.0 if np.sign(train).sum() >= 0 else -1.0
    return 0.5 + 0.5 * np.sign(direction * test)


def _baseline(key: str, correct: np.ndarray, groups: np.ndarray, *, on: str = "training") -> Baseline:
    accuracy = float(correct.mean())
    sums = np.bincount(np.unique(groups, return_inverse=True)[1], weights=correct - accuracy)
    title, why = _RULES[key]
    return Baseline(key, title, on, accuracy, float(math.sqrt((sums**2).sum()) / len(correct)), len(correct), why)


def _from_train_to_val(
    ratios: np.ndarray, words: _Features | None, val: Sequence[SampledPair], seed: int
) -> list[Baseline]:
    groups, _ = _groups(np.array([pair.prompt for pair in val], np.uint64))
    correct = _by_length(ratios, np.array([pair.log_ratio for pair in val]))
    found = [_baseline("length", correct, groups, on="validation")]
    if words is not None:
        weights = words.fit(np.ones(len(ratios), bool), seed)
        correct = words.same_idf(val).correct(weights, np.ones(len(val), bool))
        found.append(_baseline("words", correct, groups, on="validation"))
    return found


class _Features:
    """Features of pairs: tf-idf difference and log length ratio."""

    def __init__(self, pairs: Sequence[SampledPair], idf: Any = None) -> None:
        from scipy import sparse
        from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

        vectorizer = HashingVectorizer(
            n_features=_FEATURES, alternate_sign=False, norm=None, ngram_range=(1, 2), token_pattern=WORD_PATTERN,
            dtype=np.float32,
        )  # fmt: skip
        texts = [_clean(pair.better) for pair in pairs] + [_clean(pair.worse) for pair in pairs]
        counts = vectorizer.transform(texts)
        self._idf = idf or TfidfTransformer(sublinear_tf=True).fit(counts)
        weighted = self._idf.transform(counts)
        ratios = sparse.csr_matrix(np.array([[pair.log_ratio] for pair in pairs], np.float32))
        self.features = sparse.hstack([weighted[: len(pairs)] - weighted[len(pairs) :], ratios], format="csr")

    def same_idf(self, pairs: Sequence[SampledPair]) -> _Features:
        """Features of other pairs with the same idf weights."""
        return _Features(pairs, self._idf)

    def fit(self, mask: np.ndarray, seed: int) -> np.ndarray:
        """[F] float64: weights fitted on the masked pairs, half of them flipped so that both labels occur."""
        from scipy import sparse
        from sklearn.linear_model import LogisticRegression

        chosen = self.features[np.flatnonzero(mask)]
        sign = np.where(np.random.default_rng([seed, 6]).random(chosen.shape[0]) < 0.5, 1.0, -1.0)
        model = LogisticRegression(
            C=_INVERSE_REGULARIZATION, fit_intercept=False, solver="liblinear", random_state=seed, max_iter=200
        )
        model.fit(sparse.diags(sign) @ chosen, sign)
        return model.coef_[0]

    def correct(self, weights: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """1 for each masked pair whose better response scores higher, 0.5 for a tie."""
        return 0.5 + 0.5 * np.sign(self.features[np.flatnonzero(mask)] @ weights)


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
