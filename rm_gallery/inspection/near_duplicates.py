"""Near duplicates: MinHash signatures of word trigrams, clustered by locality-sensitive hashing.

The textbook method (Broder 1997; 32 hashes in 8 bands of 4) over flat arrays: 64 bytes a group, where an index of
Python objects would take gigabytes for a million pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from rm_gallery.inspection.texts import WordIds

# N groups, S segments (texts), W words, T trigrams, H hashes of a signature

NUM_HASHES = 32
BAND_SIZE = 4  # 4 x 16 bits: a band is one 64-bit number
MIN_SIMILARITY = 0.8
MAX_WORDS = 300
"""Words of each response that are compared; of the prompt the last ones, as many as the responses have together."""
MIN_TRIGRAMS = 8
"""Groups with fewer trigrams are too short to compare."""
_BATCH = 2048

_RANDOM = np.random.default_rng(20_240_229)
_FACTORS = _RANDOM.integers(0, 2**63, NUM_HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _RANDOM.integers(0, 2**63, NUM_HASHES, dtype=np.uint64)


class Signatures:
    """Collects the words of groups and hashes them in batches."""

    def __init__(self) -> None:
        self._ids = WordIds()
        self._segments: list[np.ndarray] = []
        self._counts: list[int] = []
        self._parts: list[np.ndarray] = []
        self._comparable: list[np.ndarray] = []

    def add(self, prompt: Sequence[str], responses: Iterable[Sequence[str]]) -> None:
        """Words of a group; the order of its responses does not matter."""
        own = [words[:MAX_WORDS] for words in responses]
        room = sum(len(words) for words in own)
        segments = [prompt[max(0, len(prompt) - room) :], *own]
        self._segments += [np.array([self._ids[word] for word in words], np.uint64) for words in segments]
        self._counts.append(len(segments))
        if len(self._counts) >= _BATCH:
            self._flush()

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Signatures [N, H] uint16, and [N] bool: whether the group is long enough to be compared."""
        self._flush()
        if not self._parts:
            return np.zeros((0, NUM_HASHES), np.uint16), np.zeros(0, bool)
        return np.concatenate(self._parts), np.concatenate(self._comparable)

    def _flush(self) -> None:
        if not self._counts:
            return
        trigrams, group = _trigrams(self._segments, self._counts)
        sizes = np.bincount(group, minlength=len(self._counts))
        signatures = np.zeros((len(sizes), NUM_HASHES), np.uint16)
        filled = np.flatnonzero(sizes)
        if len(filled):
            starts = np.concatenate([[0], np.cumsum(sizes[filled])[:-1]])
            for index in range(NUM_HASHES):
                hashed = (trigrams * _FACTORS[index] + _OFFSETS[index]) >> np.uint64(32)
                lowest = np.minimum.reduceat(hashed, starts)
                signatures[filled, index] = (lowest & np.uint64(0xFFFF)).astype(np.uint16)
        self._parts.append(signatures)
        self._comparable.append(sizes >= MIN_TRIGRAMS)
        self._segments, self._counts = [], []


def _trigrams(segments: list[np.ndarray], counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Hash of every three consecutive words of a segment, and the group of each; both [T]."""
    words = np.concatenate(segments)
    segment = np.repeat(np.arange(len(segments)), [len(each) for each in segments])
    group_of_segment = np.repeat(np.arange(len(counts)), counts)
    if len(words) < 3:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    mixed = words[:-2] * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) + words[1:-1] * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(32))) + words[2:] * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    within = segment[:-2] == segment[2:]
    return mixed[within], group_of_segment[segment[:-2][within]]


def near_clusters(signatures: np.ndarray) -> np.ndarray:
    """[N] int64: for each signature the first one of its cluster of near duplicates, itself when it has none.

    Two signatures are near when at least MIN_SIMILARITY of their hashes agree, an estimate of the Jaccard similarity of
    their trigrams. Among the signatures with equal hashes in a band, each is compared with the first and the previous.
    """
    count = len(signatures)
    bands = np.ascontiguousarray(signatures).view(np.uint64)  # [N, H / BAND_SIZE]
    left, right = [], []
    for band in range(bands.shape[1] if count else 0):
        order = np.argsort(bands[:, band], kind="stable")
        keys = bands[order, band]
        is_first = np.concatenate([[True], keys[1:] != keys[:-1]])
        first = np.maximum.accumulate(np.where(is_first, np.arange(count), 0))
        later = np.flatnonzero(~is_first)
        for earlier in (first[later], later - 1):
            one, other = order[earlier], order[later]
            near = _agreement(signatures, one, other) >= MIN_SIMILARITY
            left.append(one[near])
            right.append(other[near])
    if not left:
        return np.arange(count)
    return connected_components(count, np.concatenate(left), np.concatenate(right))


def _agreement(signatures: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[L] share of equal hashes; in blocks, so memory stays constant."""
    parts = [
        (signatures[one[start : start + 65_536]] == signatures[other[start : start + 65_536]]).mean(axis=1)
        for start in range(0, len(one), 65_536)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def connected_components(count: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[count] int64: the smallest index of each node's component.

    left, right: [L] the two ends of each edge. Example: 4 nodes, edges 0-2 and 2-3, give [0 1 0 0].
    """
    label = np.arange(count)
    while True:
        low = np.minimum(label[left], label[right])
        new = label.copy()
        # The ends and their labels all take the lower label, so long chains converge in few rounds.
        for index in (left, right, label[left], label[right]):
            np.minimum.at(new, index, low)
        new = new[new]
        if (new == label).all():
            return label
        label = new
