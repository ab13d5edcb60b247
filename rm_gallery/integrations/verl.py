"""Reward functions of verl: `custom_reward_function.path=pkg://rm_gallery.integrations.verl`. Does not need verl.

verl passes the response, not the prompt, so rows of its data need the prompt in `extra_info`:

    {"data_source": ..., "prompt": messages, "reward_model": {"ground_truth": ""}, "extra_info": {"prompt": messages}}
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from rm_gallery.errors import BadRow, UserError
from rm_gallery.integrations.scorers import Sample, build_group, open_scorer, score_samples
from rm_gallery.scoring.base import BaseScorer

URL_VARIABLE = "RM_GALLERY_REWARD_URL"
_KEYS = ("prompt", "raw_prompt", "messages", "question")

_scorers: dict[str, tuple[Any, BaseScorer]] = {}
_lock = threading.Lock()


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
    *,
    url: str | Sequence[str] | None = None,
    prompt_key: str | None = None,
    tokenizer: Any = None,
    invalid_reward: float | None = None,
    **settings: Any,
) -> dict[str, float]:
    """`{"score": reward}` of a response by a reward server. verl runs it in threads.

    The first six parameters are verl's; the others come from `custom_reward_function.reward_kwargs`.
    reward_router_address, reward_model_tokenizer: of the reward model that verl runs itself (`reward_model.enable`).
    url: of a server or several with the same model, which are used in turn, separated by commas or as a list; by
    default reward_router_address or the environment variable RM_GALLERY_REWARD_URL. prompt_key: of the prompt (text or
    messages) in extra_info; by default the first of prompt, raw_prompt, messages and question. tokenizer: folder of the
    reward model, as `RemoteScorer` has it. settings: of `RemoteScorer` (protocol, model, api_key, timeout, retries,
    concurrency). invalid_reward: of a response that cannot be scored, such as one with more tokens than the model has
    positions; answers then have `invalid` too, 0 or 1, which verl logs. None raises UserError for such a response, as
    do servers that do not answer in time.
    """
    scorer = _find_scorer(url, reward_router_address, tokenizer, reward_model_tokenizer, settings)
    [reward] = score_samples(scorer, [_sample(solution_str, extra_info, prompt_key)])
    return _answer(reward, invalid_reward)


async def acompute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
    *,
    url: str | Sequence[str] | None = None,
    prompt_key: str | None = None,
    tokenizer: Any = None,
    invalid_reward: float | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Async `compute_score`, which verl's reward loop awaits: requests of a batch run concurrently."""
    scorer = await asyncio.to_thread(
        _find_scorer, url, reward_router_address, tokenizer, reward_model_tokenizer, settings
    )
    group = build_group(scorer, [_sample(solution_str, extra_info, prompt_key)])
    found: float | Exception
    try:
        [[found]] = await scorer.ascore([group])
    except UserError as error:
        if not isinstance(error.__cause__, BadRow):  # of a server, not of the response
            raise
        found = error.__cause__
    return _answer(found, invalid_reward)


def compute_scores(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[Mapping[str, Any] | None] | None = None,
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
    *,
    url: str | Sequence[str] | None = None,
    prompt_key: str | None = None,
    tokenizer: Any = None,
    invalid_reward: float | None = None,
    **settings: Any,
) -> list[float]:
    """The rewards of a batch, for `reward_manager.name=batch`; see `compute_score`."""
    scorer = _find_scorer(url, reward_router_address, tokenizer, reward_model_tokenizer, settings)
    infos = [None] * len(solution_strs) if extra_infos is None else extra_infos
    samples = [_sample(*each, prompt_key) for each in zip(solution_strs, infos, strict=True)]
    return [_answer(reward, invalid_reward)["score"] for reward in score_samples(scorer, samples)]


def _find_scorer(
    url: str | Sequence[str] | None, router: str | None, own: Any, routed: Any, settings: Mapping[str, Any]
) -> BaseScorer:
    """The scorer of these servers, made once for a process."""
    address = None if router is None else router if "://" in router else f"http://{router}"
    found = url or address or os.environ.get(URL_VARIABLE)
    if not found:
        raise UserError(
            f"no reward server: set custom_reward_function.reward_kwargs.url or {URL_VARIABLE}, or reward_model.enable"
        )
    source = found if isinstance(found, str) else list(found)  # a list of OmegaConf is another type
    tokenizer = own if own is not None else routed
    key = json.dumps(
        [source, str(tokenizer) if isinstance(tokenizer, str) else id(tokenizer), dict(settings)], default=str
    )
    with _lock:
        if key not in _scorers:
            _scorers[key] = tokenizer, open_scorer(source, tokenizer=tokenizer, **settings)  # keeps the id in use
        return _scorers[key][1]


def _sample(response: str, extra_info: Mapping[str, Any] | None, prompt_key: str | None) -> Sample:
    info = extra_info or {}
    keys = _KEYS if prompt_key is None else (prompt_key,)
    prompt = next((info[key] for key in keys if info.get(key) is not None), None)
    if prompt is None:
        raise UserError(
            f"extra_info has no prompt (keys: {', '.join(info) or 'none'}): write the prompt of each row of the data "
            "into extra_info.prompt, or name its key with custom_reward_function.reward_kwargs.prompt_key"
        )
    prompt = prompt if isinstance(prompt, str | Mapping) else [dict(turn) for turn in prompt]  # or an array
    return Sample(prompt, response, info.get("tools"))


def _answer(reward: float | Exception, invalid_reward: float | None) -> dict[str, float]:
    """What verl gets for a response. All answers of a run have the same keys, since verl makes columns of them."""
    invalid = {} if invalid_reward is None else {"invalid": float(isinstance(reward, BadRow))}
    if isinstance(reward, BadRow) and invalid_reward is not None:
        return {"score": float(invalid_reward), **invalid}
    if isinstance(reward, Exception):
        raise (
            UserError(
                f"the response cannot be scored: {reward}; set reward_kwargs.invalid_reward to the reward of such"
            )
            if isinstance(reward, BadRow)
            else reward
        )
    return {"score": float(reward), **invalid}
