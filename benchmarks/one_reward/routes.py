"""The routes: how a user gets rewards, each as a function that yields the rewards of conversations, several times."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from benchmarks.one_reward.setting import Setting

Found = dict[int, float]
"""Rewards by the number of the conversation; a route may have no place for some."""


@dataclass(frozen=True)
class Route:
    """One way to a reward."""

    name: str
    call: str
    """How a user calls it."""
    run: Callable[[Setting], Iterator[Found]]
    """Several times: all at once, each alone, in other orders."""
    needs: str = ""
    """A package."""


def usable(setting: Setting, *, tools: bool = True, forged: bool = False) -> list[int]:
    """Conversations that a route takes."""
    return [n for n, case in enumerate(setting.cases) if (tools or not case.tools) and (forged or not case.forges)]


def _float(text: str) -> float:
    return float(struct.unpack("<f", base64.b64decode(text))[0])


def validation(setting: Setting) -> Iterator[Found]:
    """The trainer's validation pass, with an objective that records what it is given."""
    from rm_gallery.data.token_cache.arrays import TokenData
    from rm_gallery.data.tokenization.token_group import Origin, split_prefix
    from rm_gallery.modeling.reward_model import load_reward_model
    from rm_gallery.objectives import bradley_terry
    from rm_gallery.schema import Comparison
    from rm_gallery.training.validation import validate

    class Recorder:
        reads, means = "last_token", staticmethod(bradley_terry.means)

        def __init__(self) -> None:
            self.found: dict[tuple[int, ...], float] = {}

        def __call__(self, rewards: Any, batch: Any) -> Any:
            ids, group, response = batch.input_ids, batch.group, batch.response
            for number, reward in enumerate(rewards.tolist()):
                own = group[response == number][0]
                text = [*ids[(group == own) & (response == -1)].tolist(), *ids[response == number].tolist()]
                self.found[tuple(text)] = reward
            return bradley_terry(rewards, batch)

    model = load_reward_model(str(setting.folder)).model.eval()
    count = len(setting.ids)
    for budget, step in ((1, 1), (300, 3), (100_000, 7)):
        recorder: Any = Recorder()
        pairs = [[setting.ids[n], setting.ids[(n + step) % count]] for n in range(count)]
        groups = [(split_prefix(pair, [Comparison(0, 1)]), Origin()) for pair in pairs]
        validate(model, TokenData.from_groups(groups), recorder, token_budget=budget)
        yield {number: recorder.found[tuple(ids)] for number, ids in enumerate(setting.ids)}


def pipeline(setting: Setting) -> Iterator[Found]:
    import torch
    from transformers import pipeline as make

    classify = make("text-classification", model=str(setting.folder), dtype=torch.float32, device="cpu")
    numbers = usable(setting)
    for size in (1, 4, 32):
        texts = [setting.texts[number] for number in numbers]
        found = classify(texts, batch_size=size, padding=True, add_special_tokens=False)
        yield {number: each["score"] for number, each in zip(numbers, found, strict=True)}


def score_with(scorer: Any, setting: Setting, numbers: Sequence[int]) -> Iterator[Found]:
    """All conversations, each alone, and by prompt, backwards, over the methods of a scorer."""
    cases = [setting.cases[number] for number in numbers]
    found = scorer.score_messages([case.messages for case in cases], tools=[case.tools for case in cases])
    yield dict(zip(numbers, found, strict=True))
    yield {
        number: scorer.score_messages([case.messages], tools=[case.tools])[0]
        for number, case in zip(numbers, cases, strict=True)
    }
    prompts = [
        (prompt, tools, [each for each in members if each in numbers])
        for prompt, tools, members in reversed(setting.by_prompt())
    ]
    groups = [
        scorer.build_group(prompt, [setting.answer(each) for each in members], tools)
        for prompt, tools, members in prompts
    ]
    for rewards in (scorer.score(groups), asyncio.run(scorer.ascore(groups))):
        yield {
            number: reward
            for (_, _, members), each in zip(prompts, rewards, strict=True)
            for number, reward in zip(members, each, strict=True)
        }


def local_scorer(setting: Setting) -> Iterator[Found]:
    from rm_gallery import RewardScorer

    for budget in (None, 1, 300):
        with RewardScorer.from_folder(setting.folder, device="cpu", token_budget=budget) as scorer:
            yield from score_with(scorer, setting, range(len(setting.cases)))


def score_command(**options: Any) -> Callable[[Setting], Iterator[Found]]:
    """A file of conversations."""

    def run(setting: Setting) -> Iterator[Found]:
        from rm_gallery.scoring.score_files import ScoreOptions, score_files

        source = setting.scratch / "conversations.jsonl"
        rows = [{"messages": case.messages, "tools": json.dumps(case.tools)} for case in setting.cases]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        output = setting.scratch / f"scored-{'-'.join(map(str, options.values()))}.jsonl"
        score_files(ScoreOptions((str(setting.folder),), (str(source),), str(output), device="cpu", **options))
        yield {number: json.loads(line)["reward"] for number, line in enumerate(output.read_text().splitlines())}

    return run


def rank_command(setting: Setting) -> Iterator[Found]:
    """A row for each response; rows of one prompt are ranked together."""
    from rm_gallery import rank

    source, output = setting.scratch / "responses.jsonl", setting.scratch / "ranked.jsonl"
    rows = [
        {
            "number": number,
            "prompt": case.messages[:-1],
            "response": case.messages[-1]["content"],
            "tools": json.dumps(case.tools),
        }
        for number, case in enumerate(setting.cases)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rank(source, str(setting.folder), output, top=100, columns=["number"], device="cpu")
    found = [json.loads(line) for line in output.read_text().splitlines()]
    yield {row["number"]: row["reward"] for row in found}


def listed(path: str, value: Callable[[Any], float], form: str, **extra: Any) -> Callable[[Setting], Iterator[Found]]:
    """A path of the server whose answer has `data`. form: of the request."""

    def ask(setting: Setting, body: dict[str, Any], numbers: Sequence[int]) -> Found:
        rows = setting.post(path, {**body, **extra})["data"]
        return {number: value(row) for number, row in zip(numbers, rows, strict=True)}

    def run(setting: Setting) -> Iterator[Found]:
        if form == "responses":
            found = [
                ask(
                    setting, {"messages": prompt, "tools": tools, "responses": [*map(setting.answer, members)]}, members
                )
                for prompt, tools, members in setting.by_prompt()
            ]
            yield {number: reward for each in found for number, reward in each.items()}
            return
        if form == "messages":
            with ThreadPoolExecutor(8) as pool:  # each alone, at the same time
                bodies = [{"messages": case.messages, "tools": case.tools} for case in setting.cases]
                alone = pool.map(lambda item: ask(setting, item[1], [item[0]]), enumerate(bodies))
                yield {number: reward for each in alone for number, reward in each.items()}
            numbers = [number for number, case in enumerate(setting.cases) if not case.tools]
            yield ask(setting, {"messages": [setting.cases[number].messages for number in numbers]}, numbers)
            return
        numbers = usable(setting, forged=form == "ids")
        texts = setting.ids if form == "ids" else setting.texts
        more = {} if form == "ids" else {"add_special_tokens": False}
        yield ask(setting, {"input": [texts[number] for number in numbers], **more}, numbers)
        for number in numbers:
            yield ask(setting, {"input": texts[number], **more}, [number])

    return run


def get_reward(setting: Setting) -> Iterator[Found]:
    numbers = usable(setting)
    texts = [setting.texts[number] for number in numbers]
    answer = setting.post("/get_reward", {"query": texts, "prompts": texts, "labels": [None] * len(texts)})
    yield dict(zip(numbers, answer["rewards"], strict=True))
    yield dict(zip(numbers, answer["scores"], strict=True))


def by_query(path: str) -> Callable[[Setting], Iterator[Found]]:
    """`/score` and `/rerank`: a prompt with its responses."""

    def run(setting: Setting) -> Iterator[Found]:
        found: Found = {}
        for prompt, tools, members in setting.by_prompt():
            documents = [setting.answer(number) for number in members]
            if path.endswith("score"):
                answer = setting.post(path, {"queries": prompt, "documents": documents, "tools": tools})
                rewards = {row["index"]: row["score"] for row in answer["data"]}
            else:
                answer = setting.post(path, {"query": prompt, "documents": documents, "tools": tools})
                rewards = {row["index"]: row["reward"] for row in answer["results"]}
            found |= {number: rewards[index] for index, number in enumerate(members)}
        yield found

    return run


def chat_completions(setting: Setting) -> Iterator[Found]:
    found: list[Any] = [
        setting.post("/v1/chat/completions", {"messages": case.messages, "tools": case.tools}) for case in setting.cases
    ]
    yield {number: each["reward"] for number, each in enumerate(found)}
    yield {number: float(each["choices"][0]["message"]["content"]) for number, each in enumerate(found)}


def remote(protocol: str, *, tokenizes: bool) -> Callable[[Setting], Iterator[Found]]:
    """RemoteScorer. tokenizes: it gets the folder as its tokenizer."""

    def run(setting: Setting) -> Iterator[Found]:
        from rm_gallery import RemoteScorer

        tokenizer = str(setting.folder) if tokenizes else None
        with RemoteScorer(setting.url, protocol, tokenizer=tokenizer) as scorer:
            yield from score_with(scorer, setting, usable(setting, forged=protocol != "openrlhf"))

    return run


def trl_function(source: str) -> Callable[[Setting], Iterator[Found]]:
    """source: an attribute of the setting, `folder` or `url`."""

    def run(setting: Setting) -> Iterator[Found]:
        from rm_gallery.integrations.trl import reward_function

        function = reward_function(str(getattr(setting, source)), **({"device": "cpu"} if source == "folder" else {}))
        cases = setting.cases
        prompts, completions = [case.messages[:-1] for case in cases], [case.messages[-1:] for case in cases]
        yield dict(enumerate(function(prompts, completions, tools=[case.tools for case in cases])))
        function.scorer.close()

    return run


def verl_functions(setting: Setting) -> Iterator[Found]:
    from rm_gallery.integrations import verl

    infos = [{"prompt": case.messages[:-1], "tools": case.tools} for case in setting.cases]
    answers = [setting.answer(number) for number in range(len(infos))]
    for tokenizer in (None, str(setting.folder)):
        where: Any = {"url": setting.url, "tokenizer": tokenizer}
        single = [
            verl.compute_score("d", answer, "", info, **where) for answer, info in zip(answers, infos, strict=True)
        ]
        yield {number: each["score"] for number, each in enumerate(single)}
        yield dict(enumerate(verl.compute_scores(["d"] * len(infos), answers, [""] * len(infos), infos, **where)))

        async def all_at_once(where: Any = where) -> list[dict[str, float]]:
            calls = (
                verl.acompute_score("d", *each, **where) for each in zip(answers, [""] * len(infos), infos, strict=True)
            )
            return await asyncio.gather(*calls)

        yield {number: each["score"] for number, each in enumerate(asyncio.run(all_at_once()))}


def openrlhf_function(setting: Setting) -> Iterator[Found]:
    from rm_gallery.integrations.openrlhf import reward_function

    function, numbers = reward_function(setting.folder, device="cpu"), usable(setting)
    texts = [setting.texts[number] for number in numbers]
    yield dict(zip(numbers, function(texts, texts, [None] * len(texts))["rewards"].tolist(), strict=True))


ROUTES = (
    Route("validation of the trainer", "`rm-gallery train`", validation),
    Route("RewardScorer", "`score`, `score_messages`, `ascore`", local_scorer),
    Route("pipeline of transformers", '`pipeline("text-classification")`', pipeline),
    Route("score", "`rm-gallery score`", score_command()),
    Route("score in two processes", "`--processes 2`", score_command(processes=2)),
    Route("score on Ray", "`--engine ray --processes 2`", score_command(engine="ray", processes=2), needs="ray"),
    Route("rank", "`rm-gallery rank`", rank_command),
    Route("/classify", "`messages`", listed("/classify", lambda row: row["probs"][0], "messages")),
    Route("/classify", "`messages` and `responses`", listed("/classify", lambda row: row["probs"][0], "responses")),
    Route("/classify", "`input`: texts", listed("/classify", lambda row: row["probs"][0], "texts")),
    Route("/classify", "`input`: token ids", listed("/classify", lambda row: row["probs"][0], "ids")),
    Route("/pooling", "`messages`", listed("/pooling", lambda row: row["data"][0], "messages", task="classify")),
    Route("/v1/embeddings", "`input`: token ids", listed("/v1/embeddings", lambda row: row["embedding"][0], "ids")),
    Route("/v1/embeddings", "`encoding_format: base64`",
          listed("/v1/embeddings", lambda row: _float(row["embedding"]), "texts", encoding_format="base64")),
    Route("/get_reward", "`query`", get_reward),
    *(Route(path, "`queries`, `documents`", by_query(path)) for path in ("/score", "/v1/score")),
    *(Route(path, "`query`, `documents`; `reward`", by_query(path))
      for path in ("/rerank", "/v1/rerank", "/v2/rerank")),
    Route("/v1/chat/completions", "`messages`", chat_completions),
    Route("/trace", "`messages`", listed("/trace", lambda row: row["reward"], "messages")),
    Route("RemoteScorer", "`auto`; the server renders", remote("auto", tokenizes=False)),
    *(Route("RemoteScorer", f"`{name}`, `tokenizer=`", remote(name, tokenizes=True))
      for name in ("vllm", "vllm-pooling", "sglang", "openrlhf")),
    Route("TRL", "`reward_function(FOLDER)`", trl_function("folder")),
    Route("TRL", "`reward_function(URL)`", trl_function("url")),
    Route("verl", "`compute_score`, `acompute_score`, `compute_scores`", verl_functions),
    Route("OpenRLHF", "`reward_func` of the file", openrlhf_function),
)  # fmt: skip
