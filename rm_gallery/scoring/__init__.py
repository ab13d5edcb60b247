"""Rewards from a trained model: `RewardScorer` in Python, `rm-gallery score` for files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rm_gallery.scoring.scorer import RewardScorer

__all__ = ["RewardScorer"]


def __getattr__(name: str) -> Any:
    # Lazy, so that other modules of this folder can be imported without torch.
    if name == "RewardScorer":
        from rm_gallery.scoring.scorer import RewardScorer

        return RewardScorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
