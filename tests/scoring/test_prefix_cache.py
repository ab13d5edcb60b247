"""The prefix cache: rewards of the uncached path from only a response's own tokens, within its memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rm_gallery.data.tokenization.token_group import TokenGroup, split_prefix
from rm_gallery.errors import UserError
from rm_gallery.scoring import RewardScorer
from rm_gallery.scoring.prefix_cache import PrefixCache
from tests.scoring.models import make_checkpoint
from tests.small import fast_first


def make_texts(seed: int, prompts: int = 3, responses: int = 5) -> list[list[np.ndarray]]:
    """Texts of each prompt; the first prompts begin with the same 40 tokens."""
    draw = np.random.default_rng(seed)
    system = draw.integers(7, 264, 40)
    found = []
    for number in range(prompts):
        own = draw.integers(7, 264, draw.integers(30, 90))
        prompt = np.concatenate([system, own]) if number < 2 else own
        found.append([np.concatenate([prompt, draw.integers(7, 264, draw.integers(1, 40))]) for _ in range(responses)])
    return found


def alone(text: Any) -> TokenGroup:
    return split_prefix([text], ())


@pytest.mark.parametrize("kind", fast_first(["qwen2", "gemma3_text", "mistral", "llama", "qwen3"], 1))
@pytest.mark.parametrize("own_layers", fast_first([True, False]))
def test_rewards_are_those_without_a_cache(kind: str, own_layers: bool, tmp_path: Path) -> None:
    """In windows too: single texts of several prompts by turns, then several responses in one call."""
    folder, _ = make_checkpoint(kind, tmp_path)
    with RewardScorer.from_folder(folder, device="cpu") as scorer:
        engine = scorer.engine
        if not own_layers:  # the library's layers, as of most types
            engine.model._reads_only_rewards = False  # type: ignore[assignment]
            for layer in engine.model.network.model.layers:
                layer.__dict__.pop("forward", None)
                layer.self_attn.__dict__.pop("forward", None)
        texts = make_texts(0)
        cache = PrefixCache(engine, 64)
        with torch.inference_mode():
            for number in range(5):
                pack = [alone(each[number]) for each in texts]
                assert np.concatenate(cache.run(pack)) == pytest.approx(np.concatenate(engine.run(pack)), abs=1e-5)
            more = make_texts(0, responses=9)  # the same prompts
            pack = [split_prefix([*each[:3], *other[5:]], ()) for each, other in zip(texts, more, strict=True)]
            pack += [alone(make_texts(7)[0][0])]
            expected = [reward for rewards in engine.run(pack) for reward in rewards]
            assert [reward for rewards in cache.run(pack) for reward in rewards] == pytest.approx(expected, abs=1e-5)
        assert cache.num_reused > 500


def test_what_is_computed_and_what_is_stored(chat_scorer: RewardScorer) -> None:
    scorer = chat_scorer
    computed: list[int] = []
    scorer.engine.model.network.model.layers[0].mlp.register_forward_pre_hook(
        lambda module, arguments: computed.append(arguments[0].shape[1])
    )
    cache = PrefixCache(scorer.engine, 64)
    computed.clear()  # of the check
    [texts] = make_texts(1, prompts=1, responses=16)

    for text in texts:
        cache.run([alone(text)])
    shared = split_prefix(texts, ()).prefix
    known = len(shared) // 16 * 16
    assert computed == [len(text) - (known if number > 1 else 0) for number, text in enumerate(texts)]
    assert cache.num_reused == 14 * known
    per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, key heads, their size, bytes
    assert cache.num_bytes == known * per_token


def test_memory_is_bounded_and_the_latest_used_prefixes_stay(chat_scorer: RewardScorer) -> None:
    per_token = 2 * 2 * 2 * 8 * 4
    cache = PrefixCache(chat_scorer.engine, 2.5 * 64 * per_token / 2**20)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(7, 264, 64) for _ in range(4)]

    def reused(number: int) -> int:
        before = cache.num_reused
        tails = [draw.integers(7, 264, 5) for _ in range(2)]
        cache.run([split_prefix([np.concatenate([prompts[number], tail]) for tail in tails], ())])
        assert cache.num_bytes <= cache._max_bytes
        return cache.num_reused - before

    assert [reused(number) for number in (0, 1, 0, 2, 0, 1, 3)] == [0, 0, 64, 0, 64, 0, 0]


def test_equal_hashes_are_not_enough(chat_scorer: RewardScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rm_gallery.scoring.prefix_cache._chain", lambda tokens: list(range(len(tokens) // 16)))
    cache = PrefixCache(chat_scorer.engine, 64)
    for texts in make_texts(3):
        pack = [split_prefix(texts, ())]
        assert cache.run(pack)[0] == pytest.approx(chat_scorer.engine.run(pack)[0], abs=1e-5)


def test_a_model_that_pads_has_no_prefixes() -> None:
    engine: Any = SimpleNamespace(model=SimpleNamespace(padded=True))
    with pytest.raises(UserError, match="--prefix-cache-mb"):
        PrefixCache(engine, 1)


def test_a_model_that_keeps_keys_elsewhere_is_refused(
    chat_scorer: RewardScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(packed: Any, layer: int, key: torch.Tensor, value: torch.Tensor) -> Any:
        found = packed.past.extend(layer, key, value, packed.starts, packed.computed_rows, packed._known_rows)
        return found[0].roll(1, 0), found[1]

    monkeypatch.setattr("rm_gallery.modeling.attention.layout.PackLayout.extend", wrong)
    with pytest.raises(UserError, match="remove --prefix-cache-mb"):
        PrefixCache(chat_scorer.engine, 64)
