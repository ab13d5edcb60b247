"""The protocols: paths, and where each has the reward in its answer.

    /classify                               vLLM: data[i].probs[0]
    /pooling                                vLLM: data[i].data[0]
    /v1/embeddings                          SGLang, OpenAI: data[i].embedding[0]
    /get_reward                             OpenRLHF: rewards[i]
    /score, /v1/score                       vLLM: data[i].score
    /rerank, /v1/rerank, /v2/rerank         Cohere, Jina, vLLM: results[i].relevance_score (a sigmoid) and .reward
    /v1/chat/completions                    OpenAI: the text of the answer, and .reward
    /trace                                  ours: data[i].reward, and data[i].rewards after each token of the response

A new protocol is a body in `requests.py` and a function here.
"""

from __future__ import annotations

import base64
import math
import time
import uuid
from array import array
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from rm_gallery.serving import requests, traces
from rm_gallery.serving.limits import Limits
from rm_gallery.serving.served import Item, Models, Scores, ServedModel, Truncation


def sigmoid(reward: float) -> float:
    """Between 0 and 1, without overflow."""
    return 1 / (1 + math.exp(-reward)) if reward >= 0 else math.exp(reward) / (1 + math.exp(reward))


def client_of(request: Request, body: requests.Body) -> str:
    """Who takes turns in the queue."""
    return f"{request.scope.get('rm_gallery.client', '')}/{body.user or ''}"


def add_protocols(router: APIRouter, models: Models, limits: Limits) -> None:
    """Add the paths of all protocols."""

    async def score(
        request: Request, body: requests.Body, items: Sequence[Item], count: int, truncation: Truncation | None = None
    ) -> tuple[ServedModel, Scores]:
        requests.check_count(count, limits.max_texts)
        model = models.find(body.model)
        return model, await model.score(items, count, client_of(request, body), truncation)

    async def score_texts(request: Request, body: requests.TextBody) -> tuple[ServedModel, Scores]:
        items, count = body.items()
        return await score(request, body, items, count, body.truncation())

    @router.post("/classify", tags=["vLLM"])
    async def classify(request: Request, body: requests.ClassifyBody) -> JSONResponse:
        """Rewards as vLLM's /classify has them, without an activation unless `use_activation` is true."""
        model, scores = await score_texts(request, body)
        rows = [
            {"index": index, "label": "LABEL_0", "probs": [value], "num_classes": 1}
            for index, value in enumerate(_activated(scores, body))
        ]
        return JSONResponse(_listed("classify", model, rows, scores.num_tokens))

    @router.post("/pooling", tags=["vLLM"])
    async def pooling(request: Request, body: requests.PoolingBody) -> JSONResponse:
        """Rewards as vLLM's /pooling has them, for the task `classify`."""
        model, scores = await score_texts(request, body)
        rows = [
            {"index": index, "object": "pooling", "data": [value]}
            for index, value in enumerate(_activated(scores, body))
        ]
        return JSONResponse(_listed("pool", model, rows, scores.num_tokens))

    @router.post("/v1/embeddings", tags=["OpenAI, SGLang"])
    async def embeddings(request: Request, body: requests.EmbeddingsBody) -> JSONResponse:
        """Rewards as embeddings of dimension 1, as SGLang gives them."""
        model, scores = await score_texts(request, body)
        in_base64 = body.encoding_format == "base64"
        rows = [
            {"object": "embedding", "index": index, "embedding": _base64(value) if in_base64 else [value]}
            for index, value in enumerate(scores.rewards)
        ]
        return JSONResponse(_listed("embd", model, rows, scores.num_tokens))

    @router.post("/get_reward", tags=["OpenRLHF"])
    async def get_reward(request: Request, body: requests.GetRewardBody) -> JSONResponse:
        """Rewards as OpenRLHF's reward server gives them."""
        items = body.items()
        _, scores = await score(request, body, items, len(items))
        return JSONResponse({"rewards": scores.rewards, "scores": scores.rewards, "extra_logs": {}})

    @router.post("/score", tags=["vLLM"])
    @router.post("/v1/score", tags=["vLLM"])
    async def score_pairs(request: Request, body: requests.ScoreBody) -> JSONResponse:
        """Rewards of responses to prompts: one prompt for all, or one for each."""
        items, count = body.read()
        model, scores = await score(request, body, items, count)
        rows = [
            {"index": index, "object": "score", "score": value} for index, value in enumerate(_activated(scores, body))
        ]
        return JSONResponse(_listed("score", model, rows, scores.num_tokens))

    _add_trace(router, models, limits)
    _add_rerank(router, score)
    _add_chat(router, score)


def _add_trace(router: APIRouter, models: Models, limits: Limits) -> None:
    @router.post("/trace", tags=["RM-Gallery"])
    async def trace(request: Request, body: requests.TraceBody) -> JSONResponse:
        """The reward after each token of the responses: that of the text if it ended there.

        Of models that do not run packed, long texts have several tokens in an item of `tokens`.
        """
        items, count = body.items()
        requests.check_count(count, limits.max_texts)
        model = models.find(body.model)
        found = await traces.trace(model, items, count, client_of(request, body))
        rows = [
            {"index": index, "reward": each.rewards[-1], "start": each.start, "before": each.before,
             "tokens": each.pieces, "rewards": each.rewards}
            for index, each in enumerate(found)
        ]  # fmt: skip
        total = sum(each.num_tokens for each in found)
        return JSONResponse(_listed("trace", model, rows, total))


def _add_rerank(router: APIRouter, score: Any) -> None:
    @router.post("/rerank", tags=["Cohere, Jina, vLLM"])
    @router.post("/v1/rerank", tags=["Cohere, Jina, vLLM"])
    @router.post("/v2/rerank", tags=["Cohere, Jina, vLLM"])
    async def rerank(request: Request, body: requests.RerankBody) -> JSONResponse:
        """Responses to a prompt by reward, best first. `relevance_score` is the sigmoid of `reward`."""
        items, documents = body.read()
        model, scores = await score(request, body, items, len(documents))
        values = [sigmoid(reward) for reward in scores.rewards] if body.is_activated(True) else scores.rewards
        order = sorted(range(len(values)), key=lambda index: -scores.rewards[index])[: body.top_n or None]
        results: list[dict[str, Any]] = []
        for index in order:
            found = {"index": index, "relevance_score": values[index], "reward": scores.rewards[index]}
            if body.return_documents:
                text = documents[index]
                found["document"] = {"text": text} if isinstance(text, str) else {"messages": text}
            results.append(found)
        usage = {"prompt_tokens": scores.num_tokens, "total_tokens": scores.num_tokens}
        meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
        return JSONResponse(
            {"id": _id("rerank"), "model": model.name, "results": results, "usage": usage, "meta": meta}
        )


def _add_chat(router: APIRouter, score: Any) -> None:
    @router.post("/v1/chat/completions", tags=["OpenAI, SGLang"])
    async def chat(request: Request, body: requests.ChatBody) -> JSONResponse:
        """The reward of the conversation, as the text of an answer and as the number `reward`."""
        model, scores = await score(request, body, body.items(), 1)
        [reward] = scores.rewards
        message = {"role": "assistant", "content": repr(reward), "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        usage = {"prompt_tokens": scores.num_tokens, "completion_tokens": 0, "total_tokens": scores.num_tokens}
        answer = {"id": _id("chatcmpl"), "object": "chat.completion", "created": int(time.time()), "model": model.name}
        return JSONResponse({**answer, "choices": [choice], "usage": usage, "reward": reward})


def _activated(scores: Scores, body: requests.Activated) -> list[float]:
    return [sigmoid(reward) for reward in scores.rewards] if body.is_activated() else scores.rewards


def _listed(kind: str, model: ServedModel, rows: list[dict[str, Any]], num_tokens: int) -> dict[str, Any]:
    """An answer with a list of results, in the shape that OpenAI and vLLM have in common."""
    usage = {
        "prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0,
        "prompt_tokens_details": None,
    }  # fmt: skip
    head = {"id": _id(kind), "object": "list", "created": int(time.time()), "model": model.name}
    return {**head, "data": rows, "usage": usage}


def _base64(value: float) -> str:
    """One float32, little-endian."""
    found = array("f", [value])
    return base64.b64encode(found.tobytes()).decode()


def _id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"
