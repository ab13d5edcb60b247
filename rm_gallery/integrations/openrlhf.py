"""A `reward_func` for OpenRLHF (`--reward.remote_url FILE.py`). Does not need OpenRLHF.

A server needs no file: `--reward.remote_url http://127.0.0.1:8000/get_reward` with `rm-gallery serve`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rm_gallery.errors import UserError
from rm_gallery.scoring.scorer import RewardScorer


def reward_function(model: str | Path, **settings: Any) -> Callable[..., dict[str, Any]]:
    """`reward_func(queries, prompts, labels)` with the rewards of a folder, which is loaded at the first call.

    A query is the prompt with the response, as the policy's chat template writes them: policy and reward model must
    have the same chat template, as with OpenRLHF's own reward models. settings: see `RewardScorer.from_folder`.
    """
    lock = threading.Lock()  # OpenRLHF calls from threads
    loaded: list[RewardScorer] = []

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **columns: Any
    ) -> dict[str, Any]:
        """Rewards for advantages, and the same as scores, as OpenRLHF's reward server gives them."""
        with lock:
            if not loaded:
                loaded.append(RewardScorer.from_folder(model, **settings))
        wrong = next((query for query in queries if not isinstance(query, str)), None)
        if wrong is not None:
            raise UserError(f"queries has a {type(wrong).__name__}; OpenRLHF passes texts")
        rewards = torch.tensor(loaded[0].score_rendered(queries), dtype=torch.float32)
        return {"rewards": rewards, "scores": rewards, "extra_logs": {"reward_model": rewards}}

    return reward_func
