"""Checkpoint folders as chat models: reward models and causal language models, loaded on first use."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from rm_gallery.core.models.base_chat_model import ChatResponse, Usage
from rm_gallery.data.tokenization.tokenizer import load_tokenizer
from rm_gallery.errors import UserError, one_line
from rm_gallery.modeling.heads import has_foreign_head, is_of_language_model, num_outputs
from rm_gallery.modeling.weight_files import (
    ADAPTER_CONFIG,
    WeightFolder,
    check_not_adapter,
    read_adapter_files,
    read_weight_folder,
    tokenizer_folder,
)
from rm_gallery.schema import Message
from rm_gallery.scoring.ensemble import EnsembleScorer, Reduction, members_of, shared_scale
from rm_gallery.scoring.model_folder import newest_checkpoint

_MAX_BATCH = 32  # conversations that generate together
_KNOWN = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "tools")
_CLASSIFIERS = ("ForSequenceClassification", "ForRewardModel", "ForRewardModeling", "RewardModel")
_FOR_REWARDS = "{} is for reward models, and this is a language model; remove it"
_WEIGHTS = ("*.safetensors", "*.bin")
_loaded: WeakValueDictionary[tuple[str, ...], Any] = WeakValueDictionary()
_loading = threading.Lock()


def _renew_lock() -> None:
    """In a forked process: the thread that held the lock was not copied."""
    global _loading
    _loading = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def open_folder(
    model: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    base: str | None = None,
    normalize: bool | None = None,
    quantized: bool = True,
    ensemble: str = "mean",
) -> LocalRewardModel | LocalGenerator:
    """The model of a checkpoint folder. Reads its configuration without torch and loads no weights.

    model: a folder, or reward model folders joined by +. base: of an adapter (LoRA), which is a language model if its
    task type is CAUSAL_LM and it holds no reward head. normalize, quantized: see `RewardScorer.from_folder`. normalize,
    ensemble (`reduce`): of an ensemble, see `RewardScorer.from_folders`.
    Raises UserError for a missing folder, a missing configuration or weights, a classifier with several labels, and
    another kind of model or adapter.
    """
    members = members_of(model)
    if len(members) > 1:
        settings: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        settings |= {"base": base, "quantized": quantized}
        return LocalEnsemble(model, members, ensemble, normalize, settings)
    normalize = bool(normalize)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise UserError(f"model={model}: no such folder (working directory {Path.cwd()}); is_local=True needs a folder")
    adapter = read_adapter_files(model, key="model")
    if adapter is not None and is_of_language_model(adapter):
        if normalize:
            raise UserError(f"model={model}: {_FOR_REWARDS.format('normalize=True')}")
        return LocalGenerator(folder, device, dtype, trust_remote_code, base, quantized=quantized)
    if adapter is not None and adapter.config.get("peft_type") == "LORA":
        return LocalRewardModel(folder, device, dtype, trust_remote_code, base, normalize, quantized)
    check_not_adapter(model, key="model")
    if base is not None:
        raise UserError(f"model={model}: base={base} is for adapters, and this folder holds none; remove it")
    config = _read_config(folder)
    if not any(found for pattern in _WEIGHTS for found in folder.glob(pattern)):
        raise UserError(f"model={model}: the folder has no weights; copy the model's *.safetensors files there")
    names = [str(name) for name in config.get("architectures") or []]
    try:
        files = read_weight_folder(model, key="model")
    except UserError:  # raised again, and once, when the weights are loaded
        files = WeightFolder(folder)
    if any(name.endswith(_CLASSIFIERS) for name in names) or has_foreign_head(files):
        named = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
        # The weights decide; a head under another name is checked when it is loaded.
        labels = num_outputs(files) or (1 if has_foreign_head(files) else named)
        record = config.get("rm_gallery")
        attributes = record.get("attributes") if isinstance(record, dict) else None
        if labels != (len(attributes) if attributes else 1):
            raise UserError(
                f"model={model}: a classifier with {labels} labels, but a reward model has one; choose another folder"
            )
        return LocalRewardModel(folder, device, dtype, trust_remote_code, normalize=normalize)
    if any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names):
        if normalize or not quantized:
            option = "normalize=True" if normalize else "quantized=False"
            raise UserError(f"model={model}: {_FOR_REWARDS.format(option)}")
        return LocalGenerator(folder, device, dtype, trust_remote_code)
    raise UserError(
        f"model={model}: {', '.join(names) or 'no architecture'} in config.json; "
        "expected a reward model (...ForSequenceClassification) or a language model (...ForCausalLM)"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        newest = newest_checkpoint(folder) or next((path.parent for path in sorted(folder.glob("*/config.json"))), None)
        hint = f"use a checkpoint in it, e.g. {newest}" if newest else "use a folder with config.json"
        raise UserError(f"model={folder}: config.json is missing; {hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy the model again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a model configuration; copy the model again")
    return config


def _shared(key: tuple[str, ...], load: Callable[[], Any]) -> Any:
    """The object that `load` returns, cached by key for as long as it is referenced."""
    with _loading:
        found = _loaded.get(key)
        if found is None:
            found = _loaded[key] = load()
        return found


class _LocalModel(ABC):
    """A checkpoint folder with its loaded model."""

    def __init__(
        self, folder: Path, device: str, dtype: str, trust_remote_code: bool, base: str | None = None,
        normalize: bool = False, quantized: bool = True,
    ) -> None:  # fmt: skip
        self.base, self.normalize, self.quantized = base, normalize, quantized
        self.folder, self.device, self.dtype = folder.resolve(), device, dtype
        self.trust_remote_code = trust_remote_code
        self._engine: Any = None
        self._error: UserError | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None}  # a copy loads the model on first use

    @abstractmethod
    def _load(self) -> Any:
        """Load the weights. Raises UserError when they cannot be loaded."""

    def engine(self) -> Any:
        """The loaded model; loads it on the first call, which blocks.

        Raises UserError when it cannot be loaded. Later calls raise the same error without another attempt, since a
        dataset may have 100,000 samples.
        """
        if self._error is not None:
            raise self._error
        if self._engine is None:
            # With the modification time: a folder that is overwritten is another model.
            names = (name for name in ("config.json", ADAPTER_CONFIG) if (self.folder / name).is_file())
            written = [(self.folder / name).stat().st_mtime_ns for name in names]
            settings = (self.device, self.dtype, self.trust_remote_code, self.base, self.normalize, self.quantized)
            try:
                self._engine = _shared(
                    (type(self).__name__, str(self.folder), str(written), *map(str, settings)), self._load
                )
            except UserError as error:
                self._error = error
                raise
        return self._engine

    async def aengine(self) -> Any:
        """`engine` without blocking the event loop."""
        return self._engine or await asyncio.to_thread(self.engine)


class LocalRewardModel(_LocalModel):
    """A sequence-classification checkpoint, which outputs rewards."""

    def _load(self) -> Any:
        from rm_gallery.scoring.scorer import RewardScorer

        dtype: Any = self.dtype
        return RewardScorer.from_folder(
            self.folder, device=self.device, dtype=dtype, trust_remote_code=self.trust_remote_code, base=self.base,
            normalize=self.normalize, quantized=self.quantized,
        )  # fmt: skip

    def scorer(self) -> Any:
        """The RewardScorer, shared by all instances with this folder."""
        return self.engine()

    async def achat(self, messages: list[Message], tools: Any = None) -> ChatResponse:
        """The reward of the last message, given those before it and the tools of the conversation.

        Raises UserError for a conversation without text.
        """
        scorer = await self.aengine()
        group = scorer.build_group(messages[:-1] or None, [[messages[-1]]], tools)
        [[reward]] = await scorer.ascore([group])
        metadata = {"model": str(self.folder), "finish_reason": "stop", "attempts": 1}
        return ChatResponse(content=repr(float(reward)), parsed={"reward": float(reward)}, metadata=metadata)


class LocalEnsemble(LocalRewardModel):
    """Several checkpoints with one reward; each is shared with other chat models of its folder."""

    def __init__(
        self, model: str, folders: Sequence[str], reduce: str, normalize: bool | None, settings: dict[str, Any]
    ) -> None:
        """Raises UserError for a folder that holds no reward model, and for an unknown `reduce`."""
        from rm_gallery.scoring.jobs import name_models

        super().__init__(Path(model), settings["device"], settings["dtype"], settings["trust_remote_code"])
        self._reduce = Reduction(reduce, key="ensemble").text
        self._names, scale = name_models(folders), shared_scale(folders, normalize)
        self._members = [open_folder(each, normalize=scale is not None, **settings) for each in folders]
        wrong = next((each for each in self._members if not isinstance(each, LocalRewardModel)), None)
        if wrong is not None:
            raise UserError(f"model={model}: {wrong.folder} is a language model, and an ensemble is of reward models")

    def engine(self) -> EnsembleScorer:
        """The loaded members; see `_LocalModel.engine`."""
        if self._engine is None:
            members = [each.engine() for each in self._members]
            self._engine = EnsembleScorer(members, reduce=self._reduce, names=self._names)
        return self._engine


class LocalGenerator(_LocalModel):
    """A causal language model, which generates text."""

    def _load(self) -> Any:
        return TextGenerator.from_folder(
            self.folder, device=self.device, dtype=self.dtype, trust_remote_code=self.trust_remote_code, base=self.base,
            quantized=self.quantized,
        )  # fmt: skip

    async def achat(self, messages: list[Message], options: dict[str, Any]) -> ChatResponse:
        """Generate one response. options: tools, max_tokens (512), temperature (0 is greedy), top_p, seed."""
        generator = await self.aengine()
        made = await generator.agenerate(messages, options)
        total = made.prompt_tokens + made.completion_tokens
        usage = Usage(prompt_tokens=made.prompt_tokens, completion_tokens=made.completion_tokens, total_tokens=total)
        metadata = {"model": str(self.folder), "finish_reason": made.finish_reason, "attempts": 1}
        return ChatResponse(content=made.text, usage=usage, metadata=metadata)


class Generated(NamedTuple):
    """A generated response, with its numbers of tokens."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str


class _Settings(NamedTuple):
    """Sampling settings; only requests with equal settings share a batch."""

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass
class _Request:
    messages: list[Message]
    settings: _Settings
    tools: list[Any]
    answer: Future[Generated]


class TextGenerator:
    """A causal language model that batches waiting requests in one worker thread, which ends when there are none."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self.network, self.tokenizer = network.eval(), tokenizer
        self._process = os.getpid()
        self._waiting: deque[_Request] = deque()
        self._lock = threading.Lock()
        self._busy = False

    @classmethod
    def from_folder(
        cls, folder: Path, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False,
        base: str | None = None, quantized: bool = True,
    ) -> TextGenerator:  # fmt: skip
        """An adapter (LoRA) is merged into its base model in memory; base, quantized: see `OpenAIChatModel`.

        Raises UserError if transformers cannot load the folder or the tokenizer has no chat template.
        """
        import torch

        from rm_gallery.modeling.language_folder import load_for_generation

        source = tokenizer_folder(str(folder), key="model", base=base)
        tokenizer = load_tokenizer(source, key="model", trust_remote_code=trust_remote_code)
        if not tokenizer.chat_template:
            raise UserError(f"model={folder}: the tokenizer has no chat template; take an instruction-tuned model")
        where = "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
        wanted = ("bf16" if where.startswith("cuda") else "fp32") if dtype == "auto" else dtype
        if wanted not in ("bf16", "fp32"):
            raise UserError(f"dtype={dtype}: must be auto, bf16 or fp32")
        network = load_for_generation(
            folder, torch.bfloat16 if wanted == "bf16" else torch.float32, base=base, quantized=quantized,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        try:
            network.to(where)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"model={folder}: the model cannot be loaded ({one_line(error)})") from error
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return cls(network, tokenizer)

    async def agenerate(self, messages: list[Message], options: dict[str, Any]) -> Generated:
        """Generate one response; requests from any event loop or thread are batched together.

        Raises UserError in a forked process.
        """
        if os.getpid() != self._process:
            raise UserError("the model was loaded before this process was forked; make the OpenAIChatModel in it")
        request = _Request(messages, _read_settings(options), _read_tools(options), Future())
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
                answers = self._generate(batch, batch[0].settings)
            except BaseException as error:
                for request in batch:
                    request.answer.set_exception(error)
            else:
                for request, answer in zip(batch, answers, strict=True):
                    request.answer.set_result(answer)

    def _take(self) -> list[_Request]:
        """The next batch: waiting requests with the settings of the first, except cancelled ones; [] for none."""
        batch: list[_Request] = []
        others: deque[_Request] = deque()
        with self._lock:
            while self._waiting and len(batch) < _MAX_BATCH:
                request = self._waiting.popleft()
                if batch and request.settings != batch[0].settings:
                    others.append(request)
                elif request.answer.set_running_or_notify_cancel():  # False: the request was cancelled
                    batch.append(request)
            self._waiting.extendleft(reversed(others))
            self._busy = bool(batch)
        return batch

    def _generate(self, batch: Sequence[_Request], settings: _Settings) -> list[Generated]:
        # B conversations, P prompt tokens (padded on the left), L = P + response tokens
        import torch

        tokenizer = self.tokenizer
        texts = [
            tokenizer.apply_chat_template(
                request.messages, tools=request.tools or None, tokenize=False, add_generation_prompt=True
            )
            for request in batch
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


def _read_tools(options: dict[str, Any]) -> list[Any]:
    from rm_gallery.scoring.inputs import with_tools

    return with_tools(options.get("tools")).get("tools", [])


def _read_settings(options: dict[str, Any]) -> _Settings:
    unknown = sorted(set(options) - set(_KNOWN))
    if unknown:
        raise UserError(f"{', '.join(unknown)}: not an option of a local model; it has {', '.join(_KNOWN)}")
    tokens = options.get("max_completion_tokens") or options.get("max_tokens") or _Settings().max_tokens
    given = {name: options[name] for name in ("temperature", "top_p", "seed") if options.get(name) is not None}
    return _Settings(max_tokens=int(tokens), **given)
