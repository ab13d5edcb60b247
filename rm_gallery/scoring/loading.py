"""Loads a model for scoring: a checkpoint folder of RM-Gallery, or any sequence classification model with one label."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.data.tokenization.template_date import freeze_date
from rm_gallery.data.tokenization.tokenizer import load_tokenizer
from rm_gallery.distributed.cpu import keep_freed_memory
from rm_gallery.errors import UserError
from rm_gallery.modeling.adapter_folder import open_adapter
from rm_gallery.modeling.export import InputRecord, read_record, read_statistics, set_pad_token
from rm_gallery.modeling.forward import pad_texts
from rm_gallery.modeling.heads import has_foreign_head, is_reward_model, no_head, num_outputs
from rm_gallery.modeling.model_folder import (
    ModelSource,
    check_model_config,
    check_one_label,
    quiet_transformers,
    read_model_config,
)
from rm_gallery.modeling.packing import OtherHeadError, Way, check_loaded
from rm_gallery.modeling.parallel.apply import DTYPES
from rm_gallery.modeling.reward_model import (
    RewardModel,
    has_position_table,
    load_reward_model,
    max_positions,
    max_rotary_positions,
)
from rm_gallery.modeling.text_part import text_part
from rm_gallery.modeling.weight_files import (
    WeightFolder,
    check_not_quantized,
    kind_of_quantization,
    read_weight_folder,
    tokenizer_folder,
)
from rm_gallery.scoring.model_folder import file_of

log = logging.getLogger(__name__)

KEY = "model"
_UNLIMITED = 2**31  # tokens
_DTYPES = {**DTYPES, "float32": torch.float32, "bfloat16": torch.bfloat16}

# R responses, L tokens of the longest text


class PaddedModel(nn.Module):
    """An unmodified transformers model: whole texts, right-padded, [R, L]. Slower than packed batches."""

    padded = True

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: PackedBatch) -> Tensor:
        """Rewards [R] float32, one per response."""
        input_ids, mask = pad_texts(batch, self.network.config.pad_token_id)
        logits = self.network(input_ids=input_ids, attention_mask=mask).logits
        if logits.numel() != len(input_ids):
            raise UserError(
                f"{type(self.network).__name__} returns logits of shape {list(logits.shape)} for {len(input_ids)} "
                "texts; a reward model returns one number per text"
            )
        return logits.reshape(-1)[: len(batch.reward_index)].float()


@dataclass(frozen=True)
class ScoringModel:
    """A model on its device with its tokenizer, ready to score."""

    model: RewardModel | PaddedModel
    tokenizer: Any
    record: InputRecord
    """The input format of training; a guess for folders without such a record."""
    positions: int | None
    """Maximum tokens of a text by a table of learned positions, or by `max_rotary_positions`; None without a limit."""
    closing_ids: tuple[int, ...] = ()
    """Token ids appended to each text (`reward_token_id` of InternLM2-style models)."""
    template_date: str | None = None
    """Date that the chat template writes as today's; None if it writes none."""
    statistics: tuple[float, float] | None = None
    """Mean and standard deviation of the validation rewards; None if the folder has none."""


def load_folder(
    folder: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    template_date: str | None = None,
    base: str | None = None,
    quantized: bool = True,
) -> ScoringModel:
    """Load a model folder, or a folder with an adapter (LoRA), which is merged into its base model in memory.

    An adapter whose base model was quantized in training (QLoRA) stays beside the base model, quantized the same way;
    quantized=False merges it into the base model that is not quantized.

    template_date: date (YYYY-MM-DD) for a chat template that writes today's; None for the day of the call.
    base: the base model of an adapter, instead of the one that its folder names.
    Raises UserError for a folder without a model, an adapter without a reward head, a classifier with several labels,
    weights without a reward head, and an unknown device or dtype.
    """
    path = str(folder)
    where = find_device(device)
    if where.type == "cpu":
        keep_freed_memory()
    kind = find_dtype(dtype, where)
    config, files, tokenizer = check_folder(path, trust_remote_code=trust_remote_code, base=base)
    adapter = open_adapter(path, key=KEY, base=base)
    is_quantized = adapter is not None and adapter.quantization is not None and quantized
    has_own_code = _has_own_code(config, trust_remote_code)
    date = freeze_date(tokenizer, template_date, key="template_date (score: --template-date)")
    model: RewardModel | PaddedModel
    try:
        if has_own_code:
            raise OtherHeadError("the folder has code of its own")
        if adapter is None:
            loaded = load_reward_model(path, key=KEY, new_head=None, attributes=attributes_of(path))
        else:
            loaded = adapter.load_quantized(kind, where) if is_quantized else adapter.load_merged()
        model, how = (
            _with_bias(path, loaded.model, loaded.model.head, loaded.head_name, loaded.head_bias),
            str(loaded.model.way),
        )
    except OtherHeadError:
        model, how = _load_other(path, config, files, has_own_code, kind), "padded"
    if adapter is not None:
        kind_of_base = kind_of_quantization(adapter.quantization)
        how_added = f"on {adapter.base}, quantized to {kind_of_base} as in training" if is_quantized else ""
        log.info("%s: an adapter, %s", path, how_added or f"merged into {adapter.base} in memory")
    with quiet_transformers():
        set_pad_token(model, tokenizer, what=f"{KEY}={path}", resize=None)  # type: ignore[arg-type]  # it needs the network alone
    try:
        model.to(where, kind).eval()
    except torch.OutOfMemoryError as error:
        raise UserError(f"{KEY}={path}: the model does not fit in the memory of {where}; try dtype=bf16") from error
    if isinstance(model, RewardModel):
        model.head.float()
    else:
        text_config = model.network.config.get_text_config()  # decoders read it there
        text_config.pad_token_id = tokenizer.pad_token_id
        text_config.use_cache = False  # no generation, so no KV cache
    log.info("%s: %s, %s on %s, %s", path, type(model.network).__name__, str(kind).removeprefix("torch."), where, how)
    limit = max_positions(model)  # type: ignore[arg-type]
    file = file_of(path, "config.json")
    at = path if file is None else file.parent  # of a hub model, its folder in the cache
    record = read_record(at) or InputRecord(
        "chat" if tokenizer.chat_template else "text", max_length=limit or _UNLIMITED
    )
    if record.own_rendering:
        log.warning(
            "%s: the model was trained on texts that a data.custom_cls rendered in its own way; pass texts rendered "
            "the same way, since messages are rendered by the chat template",
            path,
        )
    reward_token = getattr(config, "reward_token_id", None)
    closing = (reward_token,) if isinstance(reward_token, int) and reward_token >= 0 else ()
    limits = (limit if has_position_table(model, limit) else None, max_rotary_positions(model.network.config))
    positions = min((each for each in limits if each is not None), default=None)
    return ScoringModel(model, tokenizer, record, positions, closing, date, read_statistics(at))


def attributes_of(path: str) -> Sequence[str]:
    """Names of the outputs of a model whose record names attributes; () for one reward."""
    file = file_of(path, "config.json")
    record = None if file is None else read_record(file.parent)
    return () if record is None else record.attributes


def no_statistics(path: str) -> UserError:
    """The error for rewards to normalize by a folder that has no mean and standard deviation."""
    return UserError(
        f"{KEY}={path}: rewards cannot be normalized: config.json has no mean and standard deviation of rewards, which "
        "a checkpoint has whose step was validated (trainer.test_freq); score without normalizing"
    )


def check_folder(
    path: str, *, trust_remote_code: bool = False, base: str | None = None
) -> tuple[Any, WeightFolder, Any]:
    """The configuration, the headers of the weight files and the tokenizer of a model folder.

    base: see `load_folder`. For an adapter, configuration and weight files are those of the base model.
    Raises UserError as `load_folder`, for what can be found without reading the weights.
    """
    adapter = open_adapter(path, key=KEY, base=base)
    if adapter is not None:
        config = text_part(read_model_config(adapter.base, key="base"))
        files = read_weight_folder(adapter.base, key="base")
        check_model_config(config, adapter.base, key="base", files=files, new_head=True)
        return config, files, load_tokenizer(tokenizer_folder(path, key=KEY, base=base), key=KEY)
    _check_remote_code(path, trust_remote_code)
    config = read_model_config(path, key=KEY, trust_remote_code=trust_remote_code)
    files = read_weight_folder(path, key=KEY)
    check_one_label(
        config, files, path, key=KEY, hint="choose the folder of a reward model", attributes=attributes_of(path)
    )
    names = list(config.architectures or [])
    has_head = is_reward_model(names) or num_outputs(files) is not None or has_foreign_head(files)
    if not _has_own_code(config, trust_remote_code) and files.tensors and not has_head:
        raise UserError(no_head(config, f"{KEY}={path}"))
    return config, files, load_tokenizer(path, key=KEY, trust_remote_code=trust_remote_code)


def _has_own_code(config: Any, trust_remote_code: bool) -> bool:
    return trust_remote_code and bool(getattr(config, "auto_map", None))


_Model = TypeVar("_Model", RewardModel, PaddedModel)


def _with_bias(path: str, model: _Model, head: Any, name: str, bias: float) -> _Model:
    """The model with the constant that the folder's head adds to each reward; logs another name and the constant."""
    if name not in ("", "score.weight") and not name.startswith("classifier"):
        log.info("%s: reward head: %s", path, name)
    if bias:
        head.bias = nn.Parameter(torch.tensor([bias]), requires_grad=False)
        log.info("%s: the reward head adds %.6g to each reward", path, bias)
    return model


def _load_other(path: str, config: Any, files: WeightFolder, has_own_code: bool, dtype: torch.dtype) -> PaddedModel:
    from transformers import AutoModel, AutoModelForSequenceClassification

    library: Any = AutoModelForSequenceClassification
    if has_own_code and library.__name__ not in config.auto_map:
        library = AutoModel  # auto_map of InternLM2's reward model has only this name
    check_not_quantized(files, config, path, key=KEY)
    if not has_own_code:
        config.num_labels = 1
    source = ModelSource(path, KEY, config, {}, files, None, Way(packed=False, reason="its own head"))
    network, head = source.load(library, dtype, trust_remote_code=has_own_code)
    if not has_own_code:
        check_loaded(network, what=f"{KEY}={path}")
    return _with_bias(path, PaddedModel(network), getattr(network, "score", None), head.name, head.bias)


def _check_remote_code(path: str, allowed: bool) -> None:
    file = Path(path).expanduser() / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # reported when transformers reads it
    from transformers import CONFIG_MAPPING

    if (
        isinstance(values, dict)
        and "auto_map" in values
        and not allowed
        and values.get("model_type") not in CONFIG_MAPPING
    ):
        raise UserError(
            f"{KEY}={path}: the model needs code from its folder ({values.get('model_type')}); read it, "
            "then allow it with trust_remote_code=True (--trust-remote-code)"
        )


def find_device(device: str) -> torch.device:
    """The device of an option; `auto` is a GPU if there is one. Raises UserError for one that does not exist."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device={device}: no such device; use auto, cpu, cuda or cuda:N") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={device}: {torch.cuda.device_count()} GPUs are visible here; write auto or cpu")
    return found


def find_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of an option; `auto` is bfloat16 on a GPU that computes it. Raises UserError for an unknown one."""
    if dtype == "auto":
        is_fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if is_fast else torch.float32
    if dtype not in _DTYPES:
        raise UserError(f"dtype={dtype}: must be auto, fp32 or bf16")
    return _DTYPES[dtype]
