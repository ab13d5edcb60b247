"""Checkpoint folders as chat models: what a folder holds is read without torch, its weights on first use."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from rm_gallery.core.models.schema.oai.response import ChatResponse, Usage
from rm_gallery.errors import UserError
from rm_gallery.schema import Message

_CLASSIFIERS = ("ForSequenceClassification", "ForRewardModel", "ForRewardModeling", "RewardModel")
_WEIGHTS = ("*.safetensors", "*.bin")
_loaded: WeakValueDictionary[tuple[str, ...], Any] = WeakValueDictionary()
_loading = threading.Lock()


def open_folder(
    model: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> LocalRewardModel | LocalGenerator:
    """The model of a checkpoint folder, not loaded yet.

    Raises UserError for a folder that is missing, holds an adapter, no configuration or no weights, a classifier with
    several labels, or a model of another kind.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise UserError(f"model={model}: no such folder (working directory {Path.cwd()}); is_local=True wants one")
    config = _read_config(folder)
    if not any(found for pattern in _WEIGHTS for found in folder.glob(pattern)):
        raise UserError(f"model={model}: the folder holds no weights; copy the model's *.safetensors files there")
    names = [str(name) for name in config.get("architectures") or []]
    if any(name.endswith(_CLASSIFIERS) for name in names):
        labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
        if labels != 1:
            raise UserError(
                f"model={model}: a classifier with {labels} labels, but a reward model has one; "
                "train one, or name another folder"
            )
        return LocalRewardModel(folder, device, dtype, trust_remote_code)
    if any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names):
        return LocalGenerator(folder, device, dtype, trust_remote_code)
    raise UserError(
        f"model={model}: {', '.join(names) or 'no architecture'} in config.json; "
        "a reward model (...ForSequenceClassification) or a language model (...ForCausalLM) is wanted"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"model={folder}: the folder holds an adapter; merge it into its base model first")
        steps = sorted(found.parent.name for found in folder.glob("*/config.json"))
        hint = f"name a folder in it, such as {folder / steps[-1]}" if steps else "name a folder with config.json"
        raise UserError(f"model={folder}: no model there, since config.json is missing; {hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy the model again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds no model configuration; copy the model again")
    return config


def _shared(key: tuple[str, ...], load: Callable[[], Any]) -> Any:
    """What `load` gives, once for all who ask with this key; let go of when nobody holds it any more."""
    with _loading:
        found = _loaded.get(key)
        if found is None:
            found = _loaded[key] = load()
        return found


class _LocalModel:
    """A folder with the object that its weights were loaded into."""

    def __init__(self, folder: Path, device: str, dtype: str, trust_remote_code: bool) -> None:
        self.folder, self.device, self.dtype = folder.resolve(), device, dtype
        self.trust_remote_code = trust_remote_code
        self._engine: Any = None
        self._error: UserError | None = None

    def _load(self) -> Any:
        raise AssertionError("a subclass loads")

    def engine(self) -> Any:
        """The loaded model; loads it, which blocks, when nobody has yet.

        Raises UserError when it cannot be loaded, again and again without a new try: a batch may have 100,000 samples.
        """
        if self._error is not None:
            raise self._error
        if self._engine is None:
            # With the time of writing: a folder that was written anew is another model.
            written = (self.folder / "config.json").stat().st_mtime_ns
            settings = (self.device, self.dtype, str(self.trust_remote_code))
            try:
                self._engine = _shared((type(self).__name__, str(self.folder), str(written), *settings), self._load)
            except UserError as error:
                self._error = error
                raise
        return self._engine

    async def aengine(self) -> Any:
        """The same without blocking the event loop."""
        return self._engine or await asyncio.to_thread(self.engine)


class LocalRewardModel(_LocalModel):
    """A sequence classification checkpoint: answers with rewards."""

    def _load(self) -> Any:
        from rm_gallery.scoring.scorer import RewardScorer

        dtype: Any = self.dtype
        return RewardScorer.from_folder(
            self.folder, device=self.device, dtype=dtype, trust_remote_code=self.trust_remote_code
        )

    def scorer(self) -> Any:
        """The RewardScorer, shared by all models of this folder."""
        return self.engine()

    async def achat(self, messages: list[Message]) -> ChatResponse:
        """The reward of the last turn, given those before it. Raises UserError for a conversation without text."""
        scorer = await self.aengine()
        group = scorer.build_group(messages[:-1] or None, [[messages[-1]]])
        [[reward]] = await scorer.ascore([group])
        metadata = {"model": str(self.folder), "finish_reason": "stop", "attempts": 1}
        return ChatResponse(content=repr(float(reward)), parsed={"reward": float(reward)}, metadata=metadata)


class LocalGenerator(_LocalModel):
    """A causal language model: generates."""

    def _load(self) -> Any:
        from rm_gallery.core.models.generate import TextGenerator

        return TextGenerator.from_folder(
            self.folder, device=self.device, dtype=self.dtype, trust_remote_code=self.trust_remote_code
        )

    async def achat(self, messages: list[Message], options: dict[str, Any]) -> ChatResponse:
        """One answer. options: max_tokens (512), temperature (0 is greedy), top_p, seed."""
        generator = await self.aengine()
        made = await generator.agenerate(messages, options)
        total = made.prompt_tokens + made.completion_tokens
        usage = Usage(prompt_tokens=made.prompt_tokens, completion_tokens=made.completion_tokens, total_tokens=total)
        metadata = {"model": str(self.folder), "finish_reason": made.finish_reason, "attempts": 1}
        return ChatResponse(content=made.text, usage=usage, metadata=metadata)
