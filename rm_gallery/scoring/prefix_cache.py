"""Prefix cache: keys and values of prompts seen lately, so that later responses compute only their own tokens.

Texts are divided into blocks of 16 tokens, and a table has the blocks that were seen, each with all before it. A prefix
is stored when it is seen for the second time, or has several responses at once: the prompt of one text alone is not
known to end anywhere. The least recently used prefix is dropped first. Decoders on the packed path only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rm_gallery.data.tokenization.token_group import TokenGroup
from rm_gallery.errors import UserError, one_line
from rm_gallery.modeling.attention.past import Layer, PastKeys
from rm_gallery.scoring.engine import Engine

BLOCK = 16
"""Tokens that are compared and stored as one."""
_MAX_SEEN = 1 << 17  # blocks without keys and values


@dataclass(eq=False)
class _Stored:
    """A prefix with its keys and values."""

    tokens: np.ndarray
    chain: list[int]
    """Of each block, a hash of it and all before it."""
    layers: dict[int, Layer]
    num_bytes: int


class PrefixCache:
    """Runs packs like `Engine.run`, with the prefixes that it knows. Used by one thread."""

    def __init__(self, engine: Engine, max_mb: float) -> None:
        """max_mb: keys and values in MiB, on the model's device. Raises UserError for a model that pads."""
        if engine.model.padded:
            raise UserError(
                "a prefix cache is for decoders that run packed, and this model computes whole texts; "
                "remove --prefix-cache-mb"
            )
        self._engine, self._max_bytes = engine, int(max_mb * 2**20)
        self._clear()
        self._check()

    def _clear(self) -> None:
        self._stored: OrderedDict[int, _Stored] = OrderedDict()  # by the hash of the last block; latest use last
        self._blocks: dict[int, _Stored] = {}  # hash of a block -> a stored prefix that has it
        self._seen: OrderedDict[int, None] = OrderedDict()
        self.num_bytes = 0
        self.num_reused = 0
        """Tokens that were not computed again so far."""

    def _check(self) -> None:
        """Raise UserError for a model whose rewards change with known keys, e.g. if its layers store them elsewhere."""
        draw = np.random.default_rng(0)
        num_ids = self._engine.model.network.get_input_embeddings().num_embeddings
        prefix, *tails = (draw.integers(0, num_ids, size).astype(np.int32) for size in (3 * BLOCK, 5, 9, 7))
        texts = [np.concatenate([prefix, tail]) for tail in tails]
        found, expected = [], []
        max_bytes, self._max_bytes = self._max_bytes, 1 << 62
        try:
            for text in texts:
                group = [TokenGroup(text[:0], [text], ())]
                found += self.run(group)[0]
                expected += self._engine.run(group)[0]
        except (AttributeError, KeyError, TypeError) as error:  # of layers without a number, for example
            raise UserError(
                f"this model's layers cannot use a prefix cache ({one_line(error)}); remove --prefix-cache-mb"
            ) from error
        used = self.num_reused
        self._max_bytes = max_bytes
        self._clear()
        is_float32 = next(self._engine.model.network.parameters()).dtype == torch.float32
        tolerance = (1e-3 if is_float32 else 0.1) * max(1.0, *map(abs, expected))
        if not used or not np.allclose(found, expected, rtol=0, atol=tolerance):
            raise UserError(
                f"this model's rewards with a prefix cache differ from those without one ({found[-1]:.6g} and "
                f"{expected[-1]:.6g}); remove --prefix-cache-mb"
            )

    def run(self, pack: Sequence[TokenGroup]) -> list[list[Any]]:
        """Rewards of the responses of each group, from one model call."""
        groups: list[TokenGroup] = []
        known: list[dict[int, Layer] | None] = []
        sizes, keep, chains = [], [], []
        for group in pack:
            # What another text may begin with: of a single text all but its last token, whose state gives the reward.
            shared = group.prefix if len(group.tails) > 1 else np.concatenate([group.prefix, group.tails[0]])[:-1]
            chain = _chain(shared)
            stored, size = self._find(shared, chain)
            repeated = len(chain) if len(group.tails) > 1 else self._count_seen(chain)
            wanted = repeated * BLOCK if repeated * BLOCK > size else 0
            self._see(chain)
            if stored is not None and len(group.tails) == 1:
                whole = np.concatenate([group.prefix, group.tails[0]])
                group = TokenGroup(whole[:size], [whole[size:]], ())
            groups.append(group)
            layers = None if stored is None else {
                layer: (key[:size], value[:size]) for layer, (key, value) in stored.layers.items()
            }  # fmt: skip
            known.append(layers)
            sizes.append(size)
            keep.append(wanted)
            chains.append((shared, chain[: wanted // BLOCK]))
        if not any(sizes) and not any(keep):
            return self._engine.run(pack)
        past = PastKeys(known, sizes, keep)
        rewards = self._engine.run(groups, past=past)
        self.num_reused += sum(sizes)
        for (shared, chain), kept in zip(chains, past.kept, strict=True):
            if kept:
                self._store(shared[: len(chain) * BLOCK], chain, kept)
        return rewards

    def _find(self, tokens: np.ndarray, chain: list[int]) -> tuple[_Stored | None, int]:
        """The stored prefix with the most tokens in common, and their number; the tokens themselves are compared."""
        count = 0
        while count < len(chain) and chain[count] in self._blocks:
            count += 1
        if not count:
            return None, 0
        found, size = self._blocks[chain[count - 1]], count * BLOCK
        if not np.array_equal(found.tokens[:size], tokens[:size]):  # hashes may collide
            return None, 0
        self._stored.move_to_end(found.chain[-1])
        return found, size

    def _count_seen(self, chain: list[int]) -> int:
        """Blocks at the start that an earlier text had."""
        return next((number for number, each in enumerate(chain) if each not in self._seen), len(chain))

    def _see(self, chain: list[int]) -> None:
        for each in chain:
            self._seen[each] = None
            self._seen.move_to_end(each)
        while len(self._seen) > _MAX_SEEN:
            self._seen.popitem(last=False)

    def _store(self, tokens: np.ndarray, chain: list[int], layers: dict[int, Layer]) -> None:
        num_bytes = sum(part.nbytes for pair in layers.values() for part in pair)
        if num_bytes > self._max_bytes or chain[-1] in self._stored:
            return
        for each in [stored for stored in self._stored.values() if stored.chain == chain[: len(stored.chain)]]:
            self._drop(each)  # a part of the new one
        while self.num_bytes + num_bytes > self._max_bytes:
            self._drop(next(iter(self._stored.values())))
        new = _Stored(tokens.copy(), chain, layers, num_bytes)
        self._stored[chain[-1]] = new
        self._blocks.update(dict.fromkeys(chain, new))
        self.num_bytes += num_bytes

    def _drop(self, stored: _Stored) -> None:
        del self._stored[stored.chain[-1]]
        self.num_bytes -= stored.num_bytes
        for each in stored.chain:
            if self._blocks.get(each) is stored:
                del self._blocks[each]


def _chain(tokens: np.ndarray) -> list[int]:
    """A hash of each whole block together with the blocks before it."""
    data = np.ascontiguousarray(tokens, np.int32).tobytes()
    found: list[int] = []
    before = 0
    step = BLOCK * 4
    for start in range(0, len(data) - step + 1, step):
        before = hash((before, data[start : start + step]))
        found.append(before)
    return found
