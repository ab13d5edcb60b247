"""A `reward_func` for OpenRLHF (`--reward.remote_url FILE.py`). Does not need OpenRLHF.

One server needs no file: `--reward.remote_url http://127.0.0.1:8000/get_reward` with `rm-gallery serve`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rm_gallery.errors import UserError
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring.inputs import InputBuilder
from rm_gallery.scoring.remote import RemoteScorer, names_servers
from rm_gallery.scoring.scorer import RewardScorer


def reward_function(model: str | Path | Sequence[str], **settings: Any) -> Callable[..., dict[str, Any]]:
    """`reward_func(queries, prompts, labels)` with the rewards of a folder or of servers, opened at the first call.

    A query is the prompt with the response, as the policy's chat template writes them: policy and reward model must
    have the same chat template, as with OpenRLHF's own reward models. model: a folder; or URLs of servers that speak
    `/get_reward`, as a list or separated by commas, which are used in turn, with retries. settings: see
    `RewardScorer.from_folder` or `RemoteScorer`.
    """
    lock = threading.Lock()  # OpenRLHF calls from threads
    opened: list[Callable[[Sequence[str]], Sequence[float]]] = []

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **columns: Any
    ) -> dict[str, Any]:
        """Rewards for advantages, and the same as scores, as OpenRLHF's reward server gives them."""
        with lock:
            if not opened:
                opened.append(_open(model, settings))
        wrong = next((query for query in queries if not isinstance(query, str)), None)
        if wrong is not None:
            raise UserError(f"queries has a {type(wrong).__name__}; OpenRLHF passes texts")
        rewards = torch.tensor(opened[0](queries), dtype=torch.float32)
        return {"rewards": rewards, "scores": rewards, "extra_logs": {"reward_model": rewards}}

    return reward_func


def _open(model: str | Path | Sequence[str], settings: dict[str, Any]) -> Callable[[Sequence[str]], Sequence[float]]:
    """The rewards of rendered texts by this model."""
    if isinstance(model, str | Path) and not names_servers(str(model)):
        return RewardScorer.from_folder(model, **settings).score_rendered
    urls = [url.strip() for url in str(model).split(",")] if isinstance(model, str | Path) else list(model)
    remote = RemoteScorer(urls, "openrlhf", **settings)
    remote.inputs = InputBuilder("text")  # texts have their special tokens, whatever the model was trained on
    return lambda queries: remote.score([PreferenceGroup("", list(queries), style="text")])[0]
