"""TextGenerator: answers of a causal language model on this machine, those waiting together in one batch."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rm_gallery.data.tokenization.tokenizer import load_tokenizer
from rm_gallery.errors import UserError, one_line
from rm_gallery.schema import Message

_MAX_BATCH = 32  # conversations that generate together
_KNOWN = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "seed")


class Generated(NamedTuple):
    """One answer, with its cost in tokens."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str


class Settings(NamedTuple):
    """How to generate; only requests with equal settings share a batch."""

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass
class _Request:
    messages: list[Message]
    settings: Settings
    answer: Future[Generated]


class TextGenerator:
    """A model with its tokenizer and one worker thread, which lives while there is work."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self.network, self.tokenizer = network.eval(), tokenizer
        self._waiting: deque[_Request] = deque()
        self._lock = threading.Lock()
        self._busy = False

    @classmethod
    def from_folder(
        cls, folder: Path, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
    ) -> TextGenerator:
        """Raises UserError for a folder that transformers cannot load, or a tokenizer without a chat template."""
        import torch
        from transformers import AutoModelForCausalLM

        from rm_gallery.modeling.reward_model import quiet_transformers

        tokenizer = load_tokenizer(str(folder), key="model", trust_remote_code=trust_remote_code)
        if not tokenizer.chat_template:
            raise UserError(f"model={folder}: the tokenizer has no chat template; take an instruction-tuned model")
        where = "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
        wanted = ("bf16" if where.startswith("cuda") else "fp32") if dtype == "auto" else dtype
        if wanted not in ("bf16", "fp32"):
            raise UserError(f"dtype={dtype}: auto, bf16 or fp32")
        try:
            with quiet_transformers():
                network = AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=torch.bfloat16 if wanted == "bf16" else torch.float32,
                    trust_remote_code=trust_remote_code,
                )
            network.to(where)
        except Exception as error:
            raise UserError(f"model={folder}: the model cannot be loaded ({one_line(error)})") from error
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return cls(network, tokenizer)

    async def agenerate(self, messages: list[Message], options: dict[str, Any]) -> Generated:
        """One answer; requests that wait meanwhile, from any loop or thread, share the next batch."""
        request = _Request(messages, _read_settings(options), Future())
        with self._lock:
            self._waiting.append(request)
            start = not self._busy
            self._busy = True
        if start:
            threading.Thread(target=self._work, name="generate", daemon=True).start()
        return await asyncio.wrap_future(request.answer)

    def _work(self) -> None:
        while batch := self._take():
            try:
                answers = self._generate([request.messages for request in batch], batch[0].settings)
            except BaseException as error:
                for request in batch:
                    request.answer.set_exception(error)
            else:
                for request, answer in zip(batch, answers, strict=True):
                    request.answer.set_result(answer)

    def _take(self) -> list[_Request]:
        """Waiting requests with the settings of the first, those who gave up left out; [] ends the worker."""
        batch: list[_Request] = []
        others: deque[_Request] = deque()
        with self._lock:
            while self._waiting and len(batch) < _MAX_BATCH:
                request = self._waiting.popleft()
                if batch and request.settings != batch[0].settings:
                    others.append(request)
                elif request.answer.set_running_or_notify_cancel():  # False: whoever asked was cancelled
                    batch.append(request)
            self._waiting.extendleft(reversed(others))
            self._busy = bool(batch)
        return batch

    def _generate(self, conversations: list[list[Message]], settings: Settings) -> list[Generated]:
        # B conversations, P prompt tokens (padded on the left), L prompt and answer
        import torch

        tokenizer = self.tokenizer
        texts = [
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages in conversations
        ]
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt", verbose=False)
        input_ids = inputs["input_ids"].to(self.network.device)  # [B, P]
        mask = inputs["attention_mask"].to(self.network.device)
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if settings.temperature > 0:
            sampling.update(do_sample=True, temperature=settings.temperature, top_p=settings.top_p)
            if settings.seed is not None:
                torch.manual_seed(settings.seed)
        ends = self._end_tokens()
        with torch.inference_mode():
            made = self.network.generate(  # [B, L]
                input_ids=input_ids, attention_mask=mask, max_new_tokens=settings.max_tokens,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=ends, **sampling,
            )  # fmt: skip
        answers = []
        for row, prompt in zip(made[:, input_ids.shape[1] :].tolist(), mask.sum(1).tolist(), strict=True):
            stop = next((place for place, token in enumerate(row) if token in ends), None)
            ids = row if stop is None else row[:stop]
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            reason = "length" if stop is None else "stop"
            answers.append(Generated(text, prompt, len(ids) + (stop is not None), reason))
        return answers

    def _end_tokens(self) -> list[int]:
        known = self.network.generation_config.eos_token_id
        ends = {*(known if isinstance(known, list) else [known]), self.tokenizer.eos_token_id}
        return sorted(token for token in ends if token is not None)


def _read_settings(options: dict[str, Any]) -> Settings:
    unknown = sorted(set(options) - set(_KNOWN))
    if unknown:
        raise UserError(f"{', '.join(unknown)}: no option of a local model; it takes {', '.join(_KNOWN)}")
    tokens = options.get("max_completion_tokens") or options.get("max_tokens") or Settings().max_tokens
    given = {name: options[name] for name in ("temperature", "top_p", "seed") if options.get(name) is not None}
    return Settings(max_tokens=int(tokens), **given)
