"""verl's reward functions: its signatures, several endpoints, retries; and verl's own reward loop, where installed."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rm_gallery.errors import UserError
from rm_gallery.integrations import verl
from tests.scoring.reward_server import RewardServer

PROMPT = [{"role": "user", "content": "How long?"}]


def length(conversation: Any) -> float:
    return 2.0 + len(conversation[-1]["content"])


@pytest.fixture(autouse=True)
def no_scorers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(verl, "_scorers", {})
    monkeypatch.delenv(verl.URL_VARIABLE, raising=False)
    yield
    for _, scorer in verl._scorers.values():
        scorer.close()


def test_one_response_by_each_function() -> None:
    with RewardServer("vllm", length) as server:
        array = np.array(PROMPT)  # as verl has columns of parquet
        info = {"prompt": array, "index": 3}
        assert verl.compute_score("d", "four", "", info, url=server.url) == {"score": 6.0}
        assert asyncio.run(verl.acompute_score("d", "four", None, info, url=server.url)) == {"score": 6.0}
        found = verl.compute_scores(["d"] * 2, ["a", "bcd"], [""] * 2, [info] * 2, url=server.url)
        assert found == [3.0, 5.0]
        assert len(verl._scorers) == 1
        assert verl.compute_score("d", "x", "", {"q": "?"}, url=server.url, prompt_key="q") == {"score": 3.0}
    assert server.bodies[0]["messages"] == [*PROMPT, {"role": "assistant", "content": "four"}]


def test_a_response_that_cannot_be_scored() -> None:
    def score(conversation: Any) -> float:
        return float("nan") if conversation[-1]["content"] == "bad" else length(conversation)

    info = {"prompt": "p"}
    with RewardServer("vllm", score) as server:
        given: dict[str, Any] = {"url": server.url, "invalid_reward": -9.0}
        assert verl.compute_score("d", "bad", "", info, **given) == {"score": -9.0, "invalid": 1.0}
        assert asyncio.run(verl.acompute_score("d", "bad", "", info, **given)) == {"score": -9.0, "invalid": 1.0}
        assert asyncio.run(verl.acompute_score("d", "good", "", info, **given)) == {"score": 6.0, "invalid": 0.0}
        assert verl.compute_scores(["d"] * 2, ["bad", "good"], [""] * 2, [info] * 2, **given) == [-9.0, 6.0]
        for call in (verl.compute_score, lambda *each, **more: asyncio.run(verl.acompute_score(*each, **more))):
            with pytest.raises(UserError, match=r"cannot be scored: reward that is not finite; set reward_kwargs"):
                call("d", "bad", "", info, url=server.url)
    with RewardServer("vllm", score, script=[500] * 9) as server, pytest.raises(UserError, match="status 500"):
        asyncio.run(verl.acompute_score("d", "good", "", info, url=server.url, retries=0, invalid_reward=-9.0))


@pytest.mark.slow
def test_endpoints_router_environment_and_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    with RewardServer("vllm", length) as a, RewardServer("vllm", length, script=[503, 503]) as b:
        for number in range(8):
            urls = f"{a.url},{b.url}"
            found = verl.compute_score("d", "x" * number, "", {"prompt": "p"}, url=urls, timeout=20)
            assert found == {"score": 2.0 + number}
        assert a.bodies and b.bodies
        router = a.url.removeprefix("http://")
        assert verl.compute_score("d", "x", "", {"prompt": "p"}, reward_router_address=router) == {"score": 3.0}
        monkeypatch.setenv(verl.URL_VARIABLE, b.url)
        assert verl.compute_score("d", "x", "", {"prompt": "p"}) == {"score": 3.0}
    monkeypatch.delenv(verl.URL_VARIABLE)
    with pytest.raises(UserError, match=r"no reward server: set custom_reward_function.reward_kwargs.url"):
        verl.compute_score("d", "x", "", {"prompt": "p"})
    with RewardServer("vllm", length) as a, pytest.raises(UserError, match=r"extra_info has no prompt \(keys: split\)"):
        verl.compute_score("d", "x", "", {"split": "train"}, url=a.url)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of other packages
def test_verl_loads_the_functions_and_runs_them_in_its_reward_loop(chat_folder: Path) -> None:
    reward = pytest.importorskip("verl.trainer.ppo.reward", reason="verl is not installed")
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer
    from verl import DataProto
    from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls

    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    ids = tokenizer("four", return_tensors="pt")["input_ids"]
    with RewardServer("vllm", length) as server:
        for name in ("compute_score", "acompute_score"):
            function = {
                "path": "pkg://rm_gallery.integrations.verl", "name": name, "reward_kwargs": {"url": [server.url]},
            }  # fmt: skip
            config = OmegaConf.create({"reward": {"custom_reward_function": function}, "data": {}})
            loaded = reward.get_custom_reward_fn(config)
            assert inspect.iscoroutinefunction(loaded) == (name == "acompute_score")
            data = DataProto.from_dict(
                {"responses": ids, "attention_mask": ids * 0 + 1},
                non_tensors={
                    "data_source": np.array(["d"], dtype=object),
                    "reward_model": np.array([{"ground_truth": ""}], dtype=object),
                    "extra_info": np.array([{"prompt": PROMPT}], dtype=object),
                },
            )

            async def run(loaded: Any = loaded, config: Any = config, data: Any = data) -> Any:
                manager = get_reward_manager_cls("naive")(config, tokenizer, loaded)
                return await manager.run_single(data)

            assert asyncio.run(run()) == {"reward_score": 6.0, "reward_extra_info": {"score": 6.0}}
