"""The environment of NeMo-RL, on the interface that its documentation describes, or on the package where installed."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from tests.scoring.reward_server import RewardServer


class EnvironmentReturn(NamedTuple):
    """The fields of NeMo-RL's record."""

    observations: Any
    metadata: Any
    next_stop_strings: Any
    rewards: Any
    terminateds: Any
    answers: Any


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of the example; NeMo-RL needs CUDA, so its interface is a stand-in where it is not installed."""
    if importlib.util.find_spec("nemo_rl") is None:
        interfaces = ModuleType("nemo_rl.environments.interfaces")
        interfaces.__dict__.update(EnvironmentInterface=object, EnvironmentReturn=EnvironmentReturn)
        for name in ("nemo_rl", "nemo_rl.environments"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, "nemo_rl.environments.interfaces", interfaces)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(remote=lambda each: each))
    monkeypatch.delitem(sys.modules, "examples.nemo_rl_environment", raising=False)
    yield importlib.import_module("examples.nemo_rl_environment").RewardEnvironment
    sys.modules.pop("examples.nemo_rl_environment", None)


@pytest.mark.slow
def test_a_step_gives_the_reward_of_each_conversation(environment: Any) -> None:
    def score(conversation: Any) -> float:
        assert all(set(turn) == {"role", "content"} for turn in conversation)
        return 2.0 + len(conversation[-1]["content"])

    with RewardServer("vllm", score) as server:
        made = environment({"url": server.url})
        logs = [
            [
                {"role": "user", "content": "One?", "token_ids": torch.zeros(3)},
                {"role": "assistant", "content": text, "token_ids": torch.zeros(2)},
            ]
            for text in ("a", "bcd")
        ]
        found = made.step(logs, [{"id": 0}, None])
        assert found.rewards.tolist() == [3.0, 5.0]
        assert found.terminateds.tolist() == [True, True]
        assert (found.metadata, found.answers) == ([{"id": 0}, None], ["a", "bcd"])
        _, metrics = made.global_post_process_and_metrics({"total_reward": found.rewards})
        assert metrics == {"reward_mean": 4.0, "reward_std": 1.0}
