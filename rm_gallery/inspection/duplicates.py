"""Duplicates: exact and near duplicates, contradictory labels, and overlap between training and validation data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from rm_gallery.inspection.baselines import CONSTANT_SHARE
from rm_gallery.inspection.collect import Split
from rm_gallery.inspection.findings import MAX_EXAMPLES, Finding
from rm_gallery.inspection.near_duplicates import near_clusters
from rm_gallery.inspection.texts import ExampleText

_NEAR = "rows with at least about 80% of the word trigrams in common (MinHash estimate"


@dataclass(frozen=True)
class _Keys:
    """Pairs as numbers; all are [C]."""

    pair: np.ndarray
    """uint64: hash of prompt and both responses, whatever their order."""
    forward: np.ndarray
    """bool: which of the two orders. Two pairs with the same key and different orders have opposite labels."""


def _keys(split: Split) -> _Keys:
    better, worse = split.response[split.better], split.response[split.worse]
    pair = _mix(_mix(split.prompt[split.group], np.minimum(better, worse)), np.maximum(better, worse))
    return _Keys(pair, better < worse)


def _mix(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A 64-bit hash of two; the order counts."""
    mixed = (one ^ (one >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15) + other
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return mixed ^ (mixed >> np.uint64(32))


def duplicate_findings(split: Split) -> list[Finding]:
    """Within one split: exact duplicates, contradictory labels, near duplicates."""
    keys = _keys(split)
    labelled = keys.pair ^ np.where(keys.forward, np.uint64(0x5555555555555555), np.uint64(0))
    first = _first_of_equals(labelled)
    repeats = np.flatnonzero(first != np.arange(len(first)))
    both = _opposites(keys.pair, keys.forward)
    return [
        Finding(
            "repeated_pairs", "exact duplicates", len(repeats), split.num_pairs,
            "every copy adds the same pair to the loss again", *_couples(split, first[repeats], repeats),
        ),
        Finding(
            "contradictions", "contradictory labels", len(both.members), split.num_pairs,
            "same prompt and responses, opposite labels: no model can fit both",
            *_couples(split, both.one, both.other),
        ),
        _near_duplicates(split),
    ]  # fmt: skip


@dataclass(frozen=True)
class _Opposites:
    members: np.ndarray
    """Pairs whose opposite exists too."""
    one: np.ndarray
    """For each key with both orders: the earlier one of the first pair of each order."""
    other: np.ndarray
    """The later one."""


def _opposites(pair: np.ndarray, forward: np.ndarray) -> _Opposites:
    keys, inverse = np.unique(pair, return_inverse=True)
    first = [np.full(len(keys), len(pair)) for _ in range(2)]
    for order in range(2):
        indices = np.flatnonzero(forward == bool(order))
        np.minimum.at(first[order], inverse[indices], indices)
    both = (first[0] < len(pair)) & (first[1] < len(pair))
    one, other = np.minimum(*first)[both], np.maximum(*first)[both]
    sorted_by_one = np.argsort(one, kind="stable")
    return _Opposites(np.flatnonzero(both[inverse]), one[sorted_by_one], other[sorted_by_one])


def _near_duplicates(split: Split) -> Finding:
    """Groups that are nearly equal to an earlier one; exact duplicates are not counted again."""
    candidates = _candidates(split)
    cluster = near_clusters(split.signatures[candidates])
    later = np.flatnonzero(cluster != np.arange(len(cluster)))
    couples = [(int(candidates[cluster[index]]), int(candidates[index])) for index in later[:MAX_EXAMPLES]]
    texts = tuple(split.text(*each, where=" ~ ".join(map(split.where, each))) for each in couples)
    return Finding(
        "near_duplicates", "near duplicates", len(later), split.num_groups,
        f"{_NEAR}, first 300 words of a response)", tuple(each.where for each in texts), "row", texts,
    )  # fmt: skip


def _candidates(split: Split) -> np.ndarray:
    """Groups that are long enough to compare, without exact duplicates of an earlier one."""
    return np.flatnonzero(split.comparable & (_first_of_equals(group_keys(split)) == np.arange(split.num_groups)))


def group_keys(split: Split) -> np.ndarray:
    """[N] uint64: hash of each group's prompt and responses, whatever their order."""
    mixed = _mix(split.response, np.zeros_like(split.response))
    sums = np.add.reduceat(np.concatenate([mixed, [np.uint64(0)]]), split.first_response[:-1])
    return _mix(split.prompt, sums)


def leakage_findings(train: Split, val: Split) -> list[Finding]:
    """What validation pairs have in common with training pairs."""
    train_keys, val_keys = _keys(train), _keys(val)
    known = np.isin(val.response, train.response)
    same, flipped = _matches(train_keys, val_keys)
    masks = [
        (
            "shared_prompts", "prompt also in training", np.isin(val.prompt[val.group], train.prompt),
            "validation accuracy partly measures memorization",
        ),
        (
            "shared_responses", "a response also in training", known[val.better] | known[val.worse],
            "the model may have learned the text",
        ),
        ("shared_pairs", "pair also in training", same, "the model can answer from memory"),
        (
            "flipped_pairs", "pair in training with the opposite label", flipped,
            "training contradicts validation",
        ),
    ]  # fmt: skip
    if max(train.prompt_share(), val.prompt_share()) > CONSTANT_SHARE:
        masks = masks[1:]
    found = [
        Finding(key, title, int(mask.sum()), val.num_pairs, why, *_examples(val, mask))
        for key, title, mask, why in masks
    ]
    is_copy = np.isin(group_keys(val), group_keys(train))
    in_val = _candidates(val)
    near = _near_across(train, val, _candidates(train), in_val[~is_copy[in_val]])
    texts = tuple(val.text(int(index)) for index in near[:MAX_EXAMPLES])
    title, examples = "near duplicates of training rows", tuple(each.where for each in texts)
    found.append(Finding("near_shared", title, len(near), val.num_groups, f"{_NEAR})", examples, "row", texts))
    return found


def _matches(train: _Keys, val: _Keys) -> tuple[np.ndarray, np.ndarray]:
    """[C of val] bool twice: the pair is in training, and its opposite is."""
    sides = [train.pair[train.forward], train.pair[~train.forward]]
    in_forward, in_backward = (np.isin(val.pair, side) for side in sides)
    return np.where(val.forward, in_forward, in_backward), np.where(val.forward, in_backward, in_forward)


def _near_across(train: Split, val: Split, in_train: np.ndarray, in_val: np.ndarray) -> np.ndarray:
    """Groups of `in_val` in a cluster with a group of `in_train`. Training comes first, so it labels the cluster."""
    cluster = near_clusters(np.concatenate([train.signatures[in_train], val.signatures[in_val]]))
    return in_val[cluster[len(in_train) :] < len(in_train)]


def _first_of_equals(keys: np.ndarray) -> np.ndarray:
    """[n] int64: index of the first element equal to each."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse] if len(keys) else np.zeros(0, np.int64)


_Examples: TypeAlias = tuple[tuple[str, ...], str, tuple[ExampleText, ...]]
"""Places, what is counted, and texts, as `Finding` takes them."""


def _examples(split: Split, mask: np.ndarray) -> _Examples:
    """The first pairs of the mask."""
    texts = tuple(split.text_of_pair(int(pair)) for pair in np.flatnonzero(mask)[:MAX_EXAMPLES])
    return tuple(each.where for each in texts), "pair", texts


def _couples(split: Split, one: np.ndarray, other: np.ndarray) -> _Examples:
    """`file:row = file:row` of the first couples of pairs, with the text of the first of each."""
    texts = []
    for a, b in zip(one[:MAX_EXAMPLES].tolist(), other[:MAX_EXAMPLES].tolist(), strict=True):
        texts.append(replace(split.text_of_pair(a), where=f"{split.where_pair(a)} = {split.where_pair(b)}"))
    return tuple(each.where for each in texts), "pair", tuple(texts)
