"""Duplicates: equal and nearly equal pairs, opposite labels, and what training and validation have in common."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rm_gallery.inspection.findings import MAX_EXAMPLES, Finding
from rm_gallery.inspection.near_duplicates import near_clusters
from rm_gallery.inspection.table import Table

CONSTANT_SHARE = 0.5
"""A prompt that more than this share of the groups has is taken for an instruction, not for a question."""


@dataclass(frozen=True)
class _Keys:
    """Pairs as numbers; all are [C]."""

    pair: np.ndarray
    """uint64: prompt and responses, in whatever order."""
    forward: np.ndarray
    """bool: which of the two orders; two pairs of the same key with different ones have opposite labels."""


def _keys(table: Table) -> _Keys:
    better, worse = table.response[table.better], table.response[table.worse]
    pair = _mix(_mix(table.prompt[table.group], np.minimum(better, worse)), np.maximum(better, worse))
    return _Keys(pair, better < worse)


def _mix(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A 64-bit hash of two; the order counts."""
    mixed = (one ^ (one >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15) + other
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return mixed ^ (mixed >> np.uint64(32))


def duplicate_findings(table: Table) -> list[Finding]:
    """Within one side: repeated pairs, contradictory pairs, near duplicates."""
    keys = _keys(table)
    labelled = keys.pair ^ np.where(keys.forward, np.uint64(0x5555555555555555), np.uint64(0))
    first = _first_of_equals(labelled)
    repeats = np.flatnonzero(first != np.arange(len(first)))
    both = _opposites(keys.pair, keys.forward)
    return [
        Finding(
            "repeated_pairs", "repeat an earlier pair exactly", len(repeats), table.num_pairs,
            "each copy counts as one more vote", _couples(table, first[repeats], repeats),
        ),
        Finding(
            "contradictions", "contradict another pair", len(both.members), table.num_pairs,
            "same prompt, same two responses, opposite labels: nobody can get both right",
            _couples(table, both.one, both.other),
        ),
        _near_duplicates(table),
    ]  # fmt: skip


@dataclass(frozen=True)
class _Opposites:
    members: np.ndarray
    """Pairs of which the opposite is there too."""
    one: np.ndarray
    """For each such key the first pair of one order, and of the other."""
    other: np.ndarray


def _opposites(pair: np.ndarray, forward: np.ndarray) -> _Opposites:
    keys, inverse = np.unique(pair, return_inverse=True)
    first = [np.full(len(keys), len(pair)) for _ in range(2)]
    for side in range(2):
        indices = np.flatnonzero(forward == bool(side))
        np.minimum.at(first[side], inverse[indices], indices)
    both = (first[0] < len(pair)) & (first[1] < len(pair))
    one, other = np.minimum(*first)[both], np.maximum(*first)[both]
    order = np.argsort(one, kind="stable")
    return _Opposites(np.flatnonzero(both[inverse]), one[order], other[order])


def _near_duplicates(table: Table) -> Finding:
    """Groups that nearly repeat an earlier one; exact copies are left to `repeated_pairs`."""
    candidates = _candidates(table)
    cluster = near_clusters(table.signatures[candidates])
    later = np.flatnonzero(cluster != np.arange(len(cluster)))
    examples = tuple(
        f"{table.where(int(candidates[cluster[index]]))} ~ {table.where(int(candidates[index]))}"
        for index in later[:MAX_EXAMPLES]
    )
    return Finding(
        "near_duplicates", "nearly repeat an earlier one", len(later), table.num_groups,
        "about 80% or more of the word triples are the same (an estimate from 32 hashes of up to 300 words a response)",
        examples,
    )  # fmt: skip


def _candidates(table: Table) -> np.ndarray:
    """Groups that are long enough to compare, without those with the same prompt and responses as an earlier one."""
    return np.flatnonzero(table.comparable & (_first_of_equals(group_keys(table)) == np.arange(table.num_groups)))


def group_keys(table: Table) -> np.ndarray:
    """[N] uint64: hash of each group's prompt and responses, whatever their order."""
    if not table.num_groups:
        return np.zeros(0, np.uint64)
    mixed = _mix(table.response, np.zeros_like(table.response))
    sums = np.add.reduceat(np.concatenate([mixed, [np.uint64(0)]]), table.first_response[:-1])
    return _mix(table.prompt, sums)


def overlap_findings(train: Table, val: Table) -> list[Finding]:
    """What validation pairs have in common with training pairs."""
    total = val.num_pairs
    train_keys, val_keys = _keys(train), _keys(val)
    known = np.isin(val.response, train.response)
    same, flipped = _matches(train_keys, val_keys)
    masks = [
        (
            "shared_prompts", "have a prompt that training has too", np.isin(val.prompt[val.group], train.prompt),
            "validation then measures memory as well",
        ),
        (
            "shared_responses", "have a response that training has too", known[val.better] | known[val.worse],
            "a model may know the text already",
        ),
        ("shared_pairs", "are training pairs too", same, "these are answered from memory"),
        (
            "flipped_pairs", "are training pairs with the labels flipped", flipped,
            "training teaches the opposite of what validation asks",
        ),
    ]  # fmt: skip
    if max(train.prompt_share(), val.prompt_share()) > CONSTANT_SHARE:
        masks = masks[1:]
    found = [Finding(key, title, int(mask.sum()), total, why, _where(val, mask)) for key, title, mask, why in masks]
    is_copy = np.isin(group_keys(val), group_keys(train))
    in_val = _candidates(val)
    near = _near_across(train, val, _candidates(train), in_val[~is_copy[in_val]])
    found.append(
        Finding(
            "near_shared",
            "nearly repeat a training pair",
            len(near),
            val.num_groups,
            "about 80% or more of the word triples are the same (an estimate)",
            tuple(val.where(int(index)) for index in near[:MAX_EXAMPLES]),
        )
    )
    return found


def _matches(train: _Keys, val: _Keys) -> tuple[np.ndarray, np.ndarray]:
    """[C of val] bool twice: the pair stands in training, and its opposite stands there."""
    sides = [train.pair[train.forward], train.pair[~train.forward]]
    in_forward, in_backward = (np.isin(val.pair, side) for side in sides)
    return np.where(val.forward, in_forward, in_backward), np.where(val.forward, in_backward, in_forward)


def _near_across(train: Table, val: Table, in_train: np.ndarray, in_val: np.ndarray) -> np.ndarray:
    """Groups of `in_val` that are in a cluster with a group of `in_train`; training comes first, so it is the label."""
    cluster = near_clusters(np.concatenate([train.signatures[in_train], val.signatures[in_val]]))
    return in_val[cluster[len(in_train) :] < len(in_train)]


def _first_of_equals(keys: np.ndarray) -> np.ndarray:
    """[n] int64: index of the first element equal to each."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse] if len(keys) else np.zeros(0, np.int64)


def _where(table: Table, mask: np.ndarray) -> tuple[str, ...]:
    return tuple(table.where(int(table.group[index])) for index in np.flatnonzero(mask)[:MAX_EXAMPLES])


def _couples(table: Table, one: np.ndarray, other: np.ndarray) -> tuple[str, ...]:
    """`file:row = file:row` of the first couples of pairs."""
    return tuple(
        f"{table.where(int(table.group[a]))} = {table.where(int(table.group[b]))}"
        for a, b in zip(one[:MAX_EXAMPLES], other[:MAX_EXAMPLES], strict=True)
    )
