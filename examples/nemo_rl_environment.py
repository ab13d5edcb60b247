"""An environment of NeMo-RL with the rewards of reward servers. In its configuration:

    env:
      rm_gallery:
        url: http://127.0.0.1:8000     # rm-gallery serve; several servers separated by commas
        tokenizer: checkpoints/bt/my-rm/global_step_500

and before the run:

    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
    from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES
    from nemo_rl.environments.utils import register_env

    name = "examples.nemo_rl_environment.RewardEnvironment"
    register_env("rm_gallery", name)
    ACTOR_ENVIRONMENT_REGISTRY[name] = PY_EXECUTABLES.SYSTEM

Needs NeMo-RL and Ray.
"""

from __future__ import annotations

from typing import Any

import ray
import torch
from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn

from rm_gallery.integrations.scorers import open_scorer


@ray.remote
class RewardEnvironment(EnvironmentInterface):
    """One turn: the reward of the whole conversation."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._scorer = open_scorer(config["url"], tokenizer=config.get("tokenizer"))

    def step(self, message_log_batch: list[Any], metadata: list[Any]) -> Any:
        """Messages also hold tokens, which the reward model does not read."""
        chats = [[{"role": each["role"], "content": each["content"]} for each in log] for log in message_log_batch]
        rewards = self._scorer.score_messages(chats)
        return EnvironmentReturn(
            observations=[{"role": "environment", "content": f"reward {reward:.4f}"} for reward in rewards],
            metadata=metadata,
            next_stop_strings=[None] * len(chats),
            rewards=torch.tensor(rewards, dtype=torch.float32),
            terminateds=torch.ones(len(chats), dtype=torch.bool),
            answers=[chat[-1]["content"] for chat in chats],
        )

    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, Any]]:
        """Mean and spread of the rewards of a batch."""
        rewards = batch["total_reward"] if "total_reward" in batch else batch["rewards"]
        return batch, {"reward_mean": rewards.mean().item(), "reward_std": rewards.std(unbiased=False).item()}
