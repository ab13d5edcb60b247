"""What each group of token data adds to the divisor of a loss, from its arrays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

# N groups, R responses


def count_values(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """[N] known attributes."""
    known = np.concatenate([[0], np.cumsum(~np.isnan(arrays["attributes"]), dtype=np.int64)])
    return np.asarray(np.diff(known[arrays["attribute_start"]]))


def count_targets(arrays: Mapping[str, np.ndarray], *, of_conversations: bool) -> np.ndarray:
    """[N] targets of a language model: of conversations all, of comparisons those of the preferred response of each."""
    group = np.repeat(np.arange(len(arrays["num_spans"])), arrays["num_spans"])
    lengths = (arrays["span_last"] - arrays["span_first"]).astype(np.int64)
    if of_conversations:
        return np.bincount(group, lengths, minlength=len(arrays["num_spans"])).astype(np.int64)
    response = arrays["response_start"][group] + arrays["span_response"]
    by_response = np.bincount(response, lengths, minlength=len(arrays["tail"]))
    owner = np.repeat(np.arange(len(arrays["num_comparisons"])), arrays["num_comparisons"])
    preferred = by_response[arrays["response_start"][owner] + arrays["better"]]
    return np.bincount(owner, preferred, minlength=len(arrays["num_comparisons"])).astype(np.int64)


def count_pairs(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """[N] pairs of responses whose numbers differ, of one attribute.

    Example: numbers 3, 1, 3 and one that is missing: 2 pairs, of 3 known responses with one pair of equal numbers.
    """
    values, counts = arrays["attributes"], arrays["num_responses"]
    known = ~np.isnan(values)
    group, value = np.repeat(np.arange(len(counts)), counts)[known], values[known]
    order = np.lexsort((value, group))
    group, value = group[order], value[order]
    is_first = np.concatenate([[True], (np.diff(group) != 0) | (np.diff(value) != 0)])[: len(group)]
    first = np.flatnonzero(is_first)
    runs = np.diff(np.append(first, len(group)))  # responses of a group with the same number
    number = np.bincount(group, minlength=len(counts))
    equal = np.bincount(group[first], runs * (runs - 1) // 2, minlength=len(counts)).astype(np.int64)
    return np.asarray(number * (number - 1) // 2 - equal)
