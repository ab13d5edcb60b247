"""Checkpoint folders as chat models: rewards, generated text, and folders that hold neither."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel

from rm_gallery.core.models import OpenAIChatModel
from rm_gallery.core.models.local import LocalRewardModel, TextGenerator
from rm_gallery.errors import UserError
from rm_gallery.scoring.scorer import RewardScorer
from tests.core.reward_folders import make_reward_folder, plain_rewards

CHAT = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reward_folder(tmp_path_factory.mktemp("reward"))


def test_a_reward_model_answers_with_the_reward(reward_folder: Path) -> None:
    model = OpenAIChatModel(str(reward_folder), is_local=True)
    [expected] = plain_rewards(reward_folder, [CHAT])
    response = model.chat(CHAT)
    assert response.parsed["reward"] == pytest.approx(expected, abs=1e-4)
    assert float(response.content) == response.parsed["reward"]
    assert model.is_reward_model and response.metadata["model"] == str(reward_folder)


def test_a_folder_is_loaded_once_and_shared(
    reward_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(reward_folder, tmp_path / "step")
    loads = []
    load = RewardScorer.from_folder

    def count(*args: object, **kwargs: object) -> RewardScorer:
        loads.append(args)
        return load(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(RewardScorer, "from_folder", count)
    models = [OpenAIChatModel(name, is_local=True) for name in (str(folder), f"{folder}/../step")]
    assert not loads, "making a model loads nothing"

    async def ask_all() -> list[float]:
        asked = (model.achat(CHAT) for model in models * 4)
        return [answer.parsed["reward"] for answer in await asyncio.gather(*asked)]

    rewards = asyncio.run(ask_all())
    assert rewards == pytest.approx([rewards[0]] * 8, abs=1e-4)
    assert len(loads) == 1 and models[0].reward_scorer is models[1].reward_scorer


@pytest.mark.slow
def test_calls_of_many_tasks_are_batched(reward_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = OpenAIChatModel(str(reward_folder), is_local=True)
    texts = [[CHAT[0], {"role": "assistant", "content": "so " * number}] for number in range(40)]
    alone = [model.chat(messages).parsed["reward"] for messages in texts]
    passes = []
    forward = model.reward_scorer.engine.model.forward
    monkeypatch.setattr(model.reward_scorer.engine.model, "forward", lambda batch: passes.append(1) or forward(batch))

    async def ask_all() -> list[float]:
        return [answer.parsed["reward"] for answer in await asyncio.gather(*map(model.achat, texts))]

    assert asyncio.run(ask_all()) == pytest.approx(alone, abs=1e-4)
    assert len(passes) < 20


def test_a_language_model_generates_the_same_alone_and_in_a_batch(
    qwen2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = OpenAIChatModel(str(qwen2_folder), is_local=True, max_tokens=6)
    assert not model.is_reward_model and model.reward_scorer is None
    questions = ["Hello", "What is the answer to everything?", "Why?"]
    alone = [model.chat(question) for question in questions]
    assert [answer.usage.completion_tokens for answer in alone if answer.usage] == [6, 6, 6]
    assert {answer.metadata["finish_reason"] for answer in alone} == {"length"}
    batches = []
    generate = TextGenerator._generate
    monkeypatch.setattr(
        TextGenerator, "_generate", lambda self, texts, how: batches.append(len(texts)) or generate(self, texts, how)
    )

    async def ask_all() -> list[str]:
        return [answer.content for answer in await asyncio.gather(*(model.achat(text) for text in questions * 3))]

    assert asyncio.run(ask_all()) == [answer.content for answer in alone] * 3
    assert sum(batches) == 9 and len(batches) <= 5, "those that wait go together"


def test_sampling_with_a_seed_repeats(qwen2_folder: Path) -> None:
    model = OpenAIChatModel(str(qwen2_folder), is_local=True, max_tokens=8, temperature=1.0)
    assert model.chat("Hello", seed=1).content == model.chat("Hello", seed=1).content
    assert model.chat("Hello", seed=1).content != model.chat("Hello", seed=2).content


def test_a_language_model_is_asked_for_json_in_the_prompt(qwen2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer(BaseModel):
        number: int

    asked = []
    generate = TextGenerator._generate

    def say(self: TextGenerator, batch: list, how: object) -> list:
        asked.extend(request.messages for request in batch)
        return [made._replace(text="{'number': '7'", finish_reason="stop") for made in generate(self, batch, how)]

    monkeypatch.setattr(TextGenerator, "_generate", say)
    model = OpenAIChatModel(str(qwen2_folder), is_local=True, max_tokens=2)
    assert model.chat("A number?", response_format=Answer).parsed == Answer(number=7)
    assert json.dumps(Answer.model_json_schema()) in asked[0][0]["content"]
    with pytest.raises(UserError, match="extra_body: not an option of a local model; it has max_tokens"):
        model.chat("A number?", extra_body={})


def test_a_folder_that_cannot_be_loaded_is_tried_once(
    reward_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(reward_folder, tmp_path / "step")
    (folder / "model.safetensors").write_bytes(b"damaged")
    tries = []
    load = LocalRewardModel._load
    monkeypatch.setattr(LocalRewardModel, "_load", lambda self: tries.append(1) or load(self))
    model = OpenAIChatModel(str(folder), is_local=True)
    for _ in range(3):
        with pytest.raises(UserError, match=r"step: model\.safetensors cannot be read"):
            model.chat(CHAT)
    assert len(tries) == 1


def with_config(change: dict[str, object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(change))
        (folder / "model.safetensors").touch()

    return write


def nested(folder: Path) -> None:
    (folder / "global_step_7").mkdir()
    (folder / "global_step_7/config.json").write_text("{}")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda folder: folder.rmdir(), "no such folder .working directory"),
        (lambda folder: None, "config.json is missing; use a folder with config.json"),
        (nested, "use a checkpoint in it, e.g. .*global_step_7"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter; merge it into its base"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: not a model configuration"),
        (lambda folder: (folder / "config.json").write_text("{}"), "has no weights"),
        (with_config({"architectures": ["BertForSequenceClassification"]}), "a classifier with 2 labels"),
        (
            with_config({"architectures": ["XForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}}),
            "a classifier with 3 labels",
        ),
        (with_config({"architectures": ["BertModel"]}), "BertModel in config.json; expected a reward model"),
        (with_config({}), "no architecture in config.json"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_at_once(
    make: Callable[[Path], object], what: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    with pytest.raises(UserError, match=what) as caught:
        OpenAIChatModel(str(folder), is_local=True)
    assert "\n" not in str(caught.value)


def test_importing_and_making_models_loads_nothing_heavy(reward_folder: Path) -> None:
    program = (
        "import importlib.util, sys\n"
        "for name in ('graders', 'graders.common', 'models', 'runner'):\n"
        "    if importlib.util.find_spec('rm_gallery.core.' + name.split('.')[0]):\n"
        "        __import__('rm_gallery.core.' + name)\n"
        "from rm_gallery.core.graders.common import RelevanceGrader\n"
        "from rm_gallery.core.models import OpenAIChatModel\n"
        "RelevanceGrader(OpenAIChatModel(sys.argv[1], is_local=True))\n"
        "RelevanceGrader(OpenAIChatModel('judge', api_key='k'))\n"
        "print(sorted({'torch', 'transformers', 'openai', 'pandas', 'numpy', 'httpx2'} & set(sys.modules)))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(reward_folder)],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (ran.stdout, ran.stderr) == ("[]\n", "")
