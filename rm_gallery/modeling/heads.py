"""The reward head of a model folder, under the library's name or that of another trainer.

Trainers name the last layer differently: `score` (transformers, ours), `value_head` (OpenRLHF), `v_head.summary` (TRL,
LLaMA-Factory), `score_head`, `reward_head`. A decoder's head of one matrix with one output computes the same under any
name, at the last token; it is read, and written as `score`. Other heads are errors: their code is not in the folder.

Loads no torch until a head is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rm_gallery.errors import UserError
from rm_gallery.modeling.weight_files import BUFFERS, FLOATS, AdapterFiles, StoredTensor, WeightFolder, list_names

HEADS = ("score", "classifier", "classification_head", "sequence_summary")
"""The names of transformers: decoders, encoders, encoder-decoders (BART, T5), XLM."""
OTHER_HEADS = ("v_head", "value_head", "reward_head", "score_head", "regression_head")
"""Names of other trainers, of adapters."""
_LAST_LAYERS = (
    "score", "classifier", "classifier.out_proj", "classification_head.out_proj", "sequence_summary.summary",
    "logits_proj",
)  # fmt: skip
_OTHER_TASKS = (
    "lm_head", "cls", "lm_predictions", "mask_predictions", "predictions", "decoder", "discriminator_predictions",
    "generator_predictions", "generator_lm_head", "embed_out", "mtp", "pooler",
)  # fmt: skip
"""Parts that predict tokens, and poolers: a reward model has no use for them."""


def adapter_heads(files: AdapterFiles) -> list[str]:
    """The tensors of an adapter that belong to a reward head."""
    heads = tuple(f"base_model.model.{name}" for name in (*HEADS, *OTHER_HEADS))
    return [*(name for name in files.tensors if name.startswith((*heads, *HEADS, *OTHER_HEADS))), *files.head_file]


def is_of_language_model(files: AdapterFiles) -> bool:
    """Whether an adapter is of a language model: by its task type, and since it holds no reward head."""
    return files.config.get("task_type") == "CAUSAL_LM" and not adapter_heads(files)


@dataclass(frozen=True)
class RewardHead:
    """One output: reward = weight [1, D] @ hidden [D] + bias."""

    weight: StoredTensor
    bias: StoredTensor | None = None

    def read_bias(self) -> float:
        """The constant that it adds to each reward. Raises UserError if it is not finite."""
        value = 0.0 if self.bias is None else float(_read(self.bias).float().item())
        if self.bias is not None and not math.isfinite(value):
            raise UserError(f"{self.bias.file}: {self.bias.name} is {value}; copy the model again")
        return value

    def copy_to(self, module: Any) -> None:
        """Copy the weight into a linear layer."""
        module.weight.data.copy_(_read(self.weight))


def _read(tensor: StoredTensor) -> Any:
    from safetensors import safe_open

    with safe_open(tensor.file, framework="pt") as source:
        return source.get_tensor(tensor.name)


def num_outputs(files: WeightFolder) -> int | None:
    """Outputs of the head under the library's name; None if the folder has none."""
    found = [files.tensors[f"{name}.weight"] for name in _LAST_LAYERS if f"{name}.weight" in files.tensors]
    return found[-1].shape[0] if found and found[-1].shape else None


def is_reward_model(architectures: Iterable[str]) -> bool:
    """Whether config.json names a class with a reward head."""
    return any(
        name.endswith("ForSequenceClassification") or "Reward" in name or "Score" in name for name in architectures
    )


def holds_language_model(config: Any, files: WeightFolder) -> bool:
    """Whether a folder is that of a language model: by its class, and since it holds no reward head."""
    names = list(config.architectures or [])
    if is_reward_model(names) or num_outputs(files) is not None or has_foreign_head(files):
        return False
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def no_head(config: Any, what: str) -> str:
    """The error for a folder that is not a reward model."""
    name = (config.architectures or [config.model_type])[0]
    return (
        f"{what}: {name} is not a sequence classification model, so it has no reward head; choose a trained reward "
        "model"
    )


def has_foreign_head(files: WeightFolder) -> bool:
    """Whether a tensor looks like the last layer of a head with one output under another name, or a pickle holds one.

    By names and shapes alone: whether the head can be run is known when the model is loaded.
    """
    tensors = [*files.tensors.values(), *files.head_file.values()]
    return any(name.endswith(".bin") for name in files.other_files) or any(
        len(each.shape) == 2 and each.shape[0] == 1 and each.name.endswith(".weight")
        and not re.search(r"\b(layers?|h|blocks?)\.\d+\.|embed", each.name)
        and each.name.partition(".")[0] not in _OTHER_TASKS
        for each in tensors
    )  # fmt: skip


@dataclass(frozen=True)
class UnreadTensors:
    """Tensors of a folder that the library's class does not read, by what they are."""

    heads: Mapping[str, Mapping[str, StoredTensor | None]] = field(default_factory=dict)
    """Outside the backbone, by module: `v_head` -> its tensors. None for those of pickles."""
    backbone: tuple[str, ...] = ()
    """Inside the backbone: layers beyond num_hidden_layers, another embedding."""

    @property
    def names(self) -> list[str]:
        return [*(name for each in self.heads.values() for name in each), *self.backbone]


def sort_unread(network: Any, files: WeightFolder, unread: Iterable[str]) -> UnreadTensors:
    """Sort the tensors that `network` does not read; drops those that a reward model never has."""
    prefix = network.base_model_prefix
    backbone = getattr(network, prefix, network)
    parts = {name for name, _ in backbone.named_children()}
    heads: dict[str, dict[str, StoredTensor | None]] = {}
    inside = []
    for name in sorted({*unread, *files.head_file}):
        root = name.removeprefix(f"{prefix}.").partition(".")[0]
        if root in _OTHER_TASKS or BUFFERS.search(name):
            continue
        tensor = files.head_file.get(name) or files.tensors.get(name)
        has_head_name = name.startswith(f"{prefix}.") is False or (tensor is not None and 1 in tensor.shape[:1])
        if root in parts or "embed" in root or not has_head_name:
            inside.append(name)
        else:
            heads.setdefault(root, {})[name] = tensor
    return UnreadTensors(heads, tuple(inside))


def find_head(
    network: Any, files: WeightFolder, unread: UnreadTensors, *, is_missing: bool, what: str, hint: str
) -> RewardHead | None:
    """A head with another name, or the bias of `score`; None if there is neither.

    is_missing: the head under the library's name is not in the folder. what: the folder in messages; hint: what to do
    about a head that cannot be run. Raises UserError for one, and for several.
    """
    wanted = str(getattr(network.config, "value_head_prefix", None) or "")
    heads = unread.heads
    if not is_missing:
        if wanted in heads and wanted not in HEADS:
            raise UserError(
                f"{what}: two reward heads, {HEADS[0]} and {list_names(heads[wanted])}, which value_head_prefix of "
                "config.json names; delete one of them"
            )
        bias = heads.get("score", {}).get("score.bias")
        weight = files.tensors.get("score.weight")
        return RewardHead(weight, bias) if bias is not None and weight is not None and bias.shape == (1,) else None
    pickles = [name for name in files.other_files if name.endswith(".bin")]
    if not heads and pickles:
        raise UserError(
            f"{what}: {pickles[0]} holds the reward head as a pickle, which can execute code and is not read; convert "
            f"it to value_head.safetensors, or {hint}"
        )
    if not heads:
        return None
    chosen = (
        heads[wanted] if wanted in heads else {name: each for part in heads.values() for name, each in part.items()}
    )
    head, score = one_output(chosen), getattr(network, "score", None)
    if head is None or score is None or head.weight.shape != tuple(score.weight.shape):
        tensors = list_names([str(each or name) for name, each in chosen.items()], limit=4)
        why = "it must be one matrix [1, D] of a decoder, with or without a bias, in a safetensors file"
        raise UserError(f"{what}: the reward head cannot be run ({tensors}): {why}; {hint}")
    return head


def one_output(tensors: Mapping[str, StoredTensor | None]) -> RewardHead | None:
    """The head that consists of exactly these tensors; None if it is anything else than one matrix and its bias."""
    known = [each for each in tensors.values() if each is not None]
    weights = [each for each in known if each.name.endswith(".weight") and len(each.shape) == 2 and each.shape[0] == 1]
    if any(each.dtype not in FLOATS for each in known):
        return None
    if len(known) != len(tensors) or len(weights) != 1 or re.search(r"\.\d+\.", weights[0].name):
        return None
    bias = [each for each in known if each.name == f"{weights[0].name.removesuffix('weight')}bias"]
    if len(known) != 1 + len(bias) or any(each.shape != (1,) for each in bias):
        return None
    return RewardHead(weights[0], bias[0] if bias else None)
