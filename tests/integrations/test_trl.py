"""The reward function of TRL: the rewards of RewardScorer, for texts and messages, and in TRL's own trainers."""

from __future__ import annotations

import inspect
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rm_gallery.errors import UserError
from rm_gallery.integrations.trl import reward_function
from rm_gallery.scoring import RemoteScorer, RewardScorer
from tests.scoring.reward_server import RewardServer

ROOT = Path(__file__).parents[2]
PROMPTS = [[{"role": "user", "content": text}] for text in ("One?", "One?", "Two?", "One?")]
COMPLETIONS = [[{"role": "assistant", "content": text}] for text in ("a", "b c", "d", "e f g")]


def length(conversation: Any) -> float:
    return 2.0 + len(conversation[-1]["content"])


def test_a_server_gives_each_completion_its_reward_in_order() -> None:
    with RewardServer("vllm", length) as server:
        function = reward_function(server.url, name="length")
        logged: dict[str, float] = {}
        assert function.__name__ == "length"
        assert function(PROMPTS, COMPLETIONS, completion_ids=[[1]] * 4, log_metric=logged.__setitem__) == [3, 5, 3, 7]
        assert function(["x", "y"], ["abc", "d"]) == [5, 3]
        assert pickle.loads(pickle.dumps(function))(["x"], ["abc"]) == [5]
        function.scorer.close()


@pytest.mark.slow
def test_folders_give_the_rewards_of_the_scorer(chat_folder: Path, text_folder: Path, encoder_folder: Path) -> None:
    for folder in (chat_folder, encoder_folder):
        found = reward_function(folder, device="cpu")(prompts=PROMPTS, completions=COMPLETIONS)
        with RewardScorer.from_folder(folder, device="cpu") as scorer:
            expected = scorer.score_messages([[*p, *c] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
        assert found == pytest.approx(expected, abs=1e-5)
    found = reward_function(text_folder, device="cpu")(prompts=["q: ", "q: "], completions=["a", "bb"])
    with RewardScorer.from_folder(text_folder, device="cpu") as scorer:
        assert found == pytest.approx(scorer.score_pairs([{"prompt": "q: ", "chosen": "a", "rejected": "bb"}])[0])


@pytest.mark.slow
def test_a_completion_that_cannot_be_scored() -> None:
    def score(conversation: Any) -> float:
        return float("nan") if conversation[-1]["content"] == "bad" else length(conversation)

    with RewardServer("vllm", score) as server:
        with pytest.raises(UserError, match=r"reward_model: completion 1 cannot be scored: reward that is not finite"):
            reward_function(server.url)(["p", "p"], ["good", "bad"])
        logged: dict[str, float] = {}
        function = reward_function(server.url, invalid_reward=-9.0)
        assert function(["p", "p"], ["good", "bad"], log_metric=logged.__setitem__) == [6, -9]
        assert logged == {"reward_model/invalid": 0.5}
    with pytest.raises(UserError, match="a reward model is a folder, a URL or a scorer, not int"):
        reward_function(3)(["p"], ["c"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of other packages
@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_trl_trains_with_the_rewards_of_the_scorer(
    algorithm: str, chat_folder: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.trl_grpo import make_trainer

    folder = encoder_folder if algorithm == "grpo" else chat_folder
    base = chat_folder.parent / "base"
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    policy = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trainer = make_trainer(
        policy, str(folder), Dataset.from_list([{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[2]}]), algorithm=algorithm,
        tokenizer=tokenizer, output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=2,
        max_completion_length=6, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    seen: list[tuple[list[Any], list[Any], list[float]]] = []
    function = trainer.reward_funcs[0]

    def recorded(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        seen.append((prompts, completions, function(prompts, completions, **columns)))
        return seen[-1][2]

    trainer.reward_funcs[0] = recorded
    trainer.train()
    assert len(seen) == 2
    with RewardScorer.from_folder(folder, device="cpu") as scorer:
        for prompts, completions, rewards in seen:
            expected = scorer.score_messages([[*p, *c] for p, c in zip(prompts, completions, strict=True)])
            assert rewards == pytest.approx(expected, abs=1e-4)
    logged = [each["reward"] for each in trainer.state.log_history if "reward" in each]
    assert logged == pytest.approx([sum(rewards) / len(rewards) for *_, rewards in seen], abs=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of other packages
@pytest.mark.skipif(torch.cuda.is_available(), reason="trains the small policy on a GPU in bfloat16")
def test_the_example_runs_as_a_command(chat_folder: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    from examples import trl_grpo

    policy = in_tmp / "policy"
    shutil.copytree(chat_folder.parent / "base", policy)
    (in_tmp / "p.jsonl").write_text("".join(json.dumps({"prompt": each, "id": 1}) + "\n" for each in PROMPTS))
    options = ["--policy", "policy", "--reward-model", str(chat_folder), "--prompts", "p.jsonl", "--steps", "1"]
    monkeypatch.setattr("sys.argv", ["trl_grpo.py", *options, "--algorithm", "rloo", "--output", "made"])
    trl_grpo.main()
    assert (in_tmp / "made/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of other packages
def test_trl_takes_the_folder_of_a_decoder(chat_folder: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(chat_folder.parent / "base", dtype=torch.float32)
    config = trl.GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, num_generations=2, use_cpu=True, bf16=False,
        report_to="none",
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=policy, reward_funcs=str(chat_folder), args=config, train_dataset=Dataset.from_list([{"prompt": "x"}]),
        processing_class=AutoTokenizer.from_pretrained(chat_folder),
    )  # fmt: skip
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    found = trainer._calculate_rewards(rows, PROMPTS, COMPLETIONS, [[1]] * 4)
    ours = reward_function(chat_folder, device="cpu")(PROMPTS, COMPLETIONS)
    assert found.flatten().tolist() == pytest.approx(ours, abs=1e-4)


@pytest.mark.slow
def test_the_page_runs_as_written(chat_folder: Path, in_tmp: Path) -> None:
    (in_tmp / "checkpoints/bt").mkdir(parents=True)
    (in_tmp / "checkpoints/bt/my-rm").symlink_to(chat_folder)
    [snippet] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/rl.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(snippet, "rl.md", "exec"), names)
    assert names["rewards"].__name__ == "helpful"


def test_examples_name_what_exists() -> None:
    import yaml

    from rm_gallery.integrations import verl

    reward = yaml.safe_load((ROOT / "examples/verl_reward_loop.yaml").read_text())["reward"]
    function = reward["custom_reward_function"]
    assert function["path"] == f"pkg://{verl.__name__}"
    parameters = inspect.signature(getattr(verl, function["name"])).parameters
    known = {*parameters, *inspect.signature(RemoteScorer.__init__).parameters}
    assert set(function["reward_kwargs"]) <= known
