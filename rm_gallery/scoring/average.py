"""`rm-gallery average`: averages the weights of reward models, or of language models, tensor by tensor.

The models are checkpoints of one run, or of runs from the same base model with other seeds or settings (WARM, Rame et
al. 2024, ICML, arXiv 2401.12187): weights that are close enough give a mean with their common features and less of
what each memorized. Unlike an ensemble, the average costs one forward pass.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rm_gallery.data.tokenization.tokenizer import load_tokenizer
from rm_gallery.errors import UserError, one_line
from rm_gallery.files import replace as publish
from rm_gallery.files import sha256_files, write_manifest
from rm_gallery.modeling.adapters import BASE_RECORD
from rm_gallery.modeling.export import (
    MEAN_KEYS,
    RECORD_KEY,
    STD_KEYS,
    InputRecord,
    apply_umask,
    fits_memory,
    read_record,
    read_statistics,
    rescore,
    write_weights,
)
from rm_gallery.modeling.generic_class import CODE_FILE
from rm_gallery.modeling.heads import holds_language_model
from rm_gallery.modeling.language_folder import plain_losses
from rm_gallery.modeling.model_folder import read_model_config
from rm_gallery.modeling.weight_files import (
    FLOATS,
    StoredTensor,
    WeightFolder,
    check_not_quantized,
    list_names,
    read_adapter_files,
    read_weight_folder,
)
from rm_gallery.scoring.jobs import name_models
from rm_gallery.scoring.loading import KEY, check_folder
from rm_gallery.scoring.merge import PROBES, merge, probe_groups
from rm_gallery.scoring.model_folder import choose_checkpoint, stats_of
from rm_gallery.training.model_card import CARD_NAME, NOT_UPLOADED, averaged_card

log = logging.getLogger(__name__)

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of config.json: what does not change the network, or does not hold for the average.
_IGNORED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", *MEAN_KEYS, *STD_KEYS, BASE_RECORD)
_MEASURED: dict[str, Any] = {"reward_mean": None, "reward_std": None, "objective": {}}
"""Of the record, with the values for an average: statistics of rewards and learned thresholds are a model's own."""
_FAR, _UNRELATED = 0.99, 0.5
"""Cosines of two models' weights below which an average may be worse, and which no common base model explains."""


@dataclass(frozen=True)
class _Member:
    """A model folder to average."""

    name: str
    path: Path
    files: WeightFolder
    tokenizer: Any
    config: Mapping[str, Any]
    record: InputRecord | None
    is_language_model: bool


def average(
    folders: Sequence[str | Path], output: str | Path, *, weights: Sequence[float] | None = None,
    base: str | None = None, dtype: str = "auto",
) -> Path:  # fmt: skip
    """Write the folder of a model whose weights are the weighted mean of those of `folders`, and return it.

    weights: of the models, divided by their sum; equal ones by default. base: base model of adapters (see `merge`).
    dtype: `fp32` or `bf16`; `auto` is that of the folders, or fp32 where they differ. Sums are float32, and at most one
    shard is in memory. An adapter (LoRA) is merged into its base model first, in a temporary folder next to the output:
    the product of averaged factors is not the average of their products.

    Raises UserError for fewer than two models, for models that differ in architecture, tokenizer, head, labels or
    input, as `merge` and `check_folder`, for an output that exists, and when it cannot be written.
    """
    paths = [choose_checkpoint(str(folder), key=KEY) for folder in folders]
    if len(paths) < 2:
        raise UserError("average needs two or more model folders")
    names, shares = name_models(paths), _shares(weights, len(paths))
    target = Path(output).expanduser()
    if target.exists():
        raise UserError(f"{target}: exists; name another folder with --output, or delete it")
    staging = target.with_name(f".{target.name}.averaging")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
            whole = _merged(paths, Path(temporary), base)
            members = [_open(name, path) for name, path in zip(names, whole, strict=True)]
            for member in members[1:]:
                _check_same(members[0], member)
            staging.mkdir()
            _write(staging, target.name, paths, members, shares, dtype)
        _rescore(staging, members[0])
        publish(staging, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({one_line(error)})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise UserError(f"--weights has {len(weights)} numbers for {count} models; give one per model, in their order")
    if not all(map(math.isfinite, weights)) or min(weights) < 0 or not sum(weights):
        raise UserError(f"--weights={','.join(f'{each:g}' for each in weights)}: must be 0 or more, and not all 0")
    return [weight / sum(weights) for weight in weights]


def _merged(paths: Sequence[str], temporary: Path, base: str | None) -> list[str]:
    """The folders of whole models: adapters merged into their base model."""
    found = []
    for number, path in enumerate(paths):
        if read_adapter_files(path, key=KEY) is None:
            found.append(path)
            continue
        log.info("%s: an adapter: merging it into its base model; the average is a whole model", path)
        found.append(str(merge(path, temporary / str(number), base=base)))
    return found


def _open(name: str, path: str) -> _Member:
    """Raises UserError for a folder without a reward model or a language model in safetensors files."""
    config, files = read_model_config(path, key=KEY), read_weight_folder(path, key=KEY)
    is_language_model = holds_language_model(config, files)
    tokenizer = load_tokenizer(path, key=KEY) if is_language_model else check_folder(path)[2]
    check_not_quantized(files, config, path, key=KEY)
    if getattr(config, "quantization_config", None) or not files.tensors:
        why = "its weights are quantized" if files.tensors else "it has no safetensors files"
        raise UserError(f"{KEY}={path}: {why}; average folders with float weights in safetensors files")
    if files.head_file:
        raise UserError(
            f"{KEY}={path}: its head is in a file of its own, value_head.safetensors, which is not averaged"
        )
    values = json.loads((files.folder / "config.json").read_text(encoding="utf-8"))
    return _Member(name, files.folder, files, tokenizer, values, read_record(files.folder), is_language_model)


def _check_same(first: _Member, other: _Member) -> None:
    """Raise UserError, with the first difference, unless the mean of their weights is a model of the same kind."""
    if first.is_language_model != other.is_language_model:
        one, two = (first, other) if first.is_language_model else (other, first)
        raise UserError(
            f"{other.name} and {first.name} cannot be averaged: {one.name} is a language model and {two.name} a reward "
            "model"
        )
    for what, one, two in (
        *_differences(first.config, other.config),
        *_tokenizer_differences(first.tokenizer, other.tokenizer),
        *_record_differences(first.record, other.record),
    ):
        raise UserError(f"{other.name} and {first.name} cannot be averaged: {what} is {one} and {two}")
    here, there = first.files.tensors, other.files.tensors
    problems = [
        *(f"{name} is missing in {other.name}" for name in here if name not in there),
        *(f"{name} is missing in {first.name}" for name in there if name not in here),
        *(
            f"{name} has shapes {list(each.shape)} and {list(there[name].shape)}"
            for name, each in here.items()
            if name in there and each.shape != there[name].shape
        ),
    ]
    if problems:
        raise UserError(f"{other.name} and {first.name} cannot be averaged: {list_names(problems)}")


def _differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    ignored = (*_IGNORED, RECORD_KEY)
    return [
        (f"{key} of config.json", _short(other.get(key)), _short(first.get(key)))
        for key in sorted({*first, *other})
        if key not in ignored and first.get(key) != other.get(key)
    ]


def _tokenizer_differences(first: Any, other: Any) -> list[tuple[str, Any, Any]]:
    facts = []
    for each in (other, first):
        texts = [each(text)["input_ids"] for text in PROBES]
        facts.append((each.get_vocab(), dict(each.special_tokens_map), each.chat_template, texts))
    names = ("the vocabulary of the tokenizer", "its special tokens", "the chat template", "the tokens of a text")
    return [(what, _short(one), _short(two)) for what, one, two in zip(names, *facts, strict=True) if one != two]


def _record_differences(first: InputRecord | None, other: InputRecord | None) -> list[tuple[str, Any, Any]]:
    """How training built their inputs, and what their outputs are; what was measured or learned beside may differ."""
    known = {**_MEASURED, "max_length": 0}
    one, two = (None if each is None else replace(each, **known) for each in (other, first))
    return [] if one == two else [("the input of training (rm_gallery in config.json)", one, two)]


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass
class _Mean:
    """Reads means of tensors, and sums up how close the models are to the first."""

    members: Sequence[_Member]
    shares: Sequence[float]
    products: list[list[float]] = field(default_factory=list)
    """Of each model: (its dot product with the first one, its squared norm)."""

    def __post_init__(self) -> None:
        self.products = [[0.0, 0.0] for _ in self.members]

    def read(self, name: str) -> Tensor:
        """The mean of one tensor, float32; a tensor of integers must be the same in all models."""
        first = _read(self.members[0].files.tensors[name])
        mean = torch.zeros_like(first, dtype=torch.float32)
        for member, share, products in zip(self.members, self.shares, self.products, strict=True):
            values = _read(member.files.tensors[name])
            if not values.is_floating_point():
                if not torch.equal(values, first):
                    raise UserError(f"{member.name}: {name} has integers other than those of {self.members[0].name}")
                continue
            values = values.float()
            if not values.isfinite().all():
                raise UserError(f"{member.name}: {name} has values that are not finite; choose another checkpoint")
            mean.add_(values, alpha=share)
            flat = values.flatten().double()
            products[0] += float(flat @ first.flatten().double())
            products[1] += float(flat @ flat)
        return mean if first.is_floating_point() else first

    def cosines(self) -> list[float]:
        """Cosine of each other model's weights with those of the first."""
        norm = math.sqrt(self.products[0][1])
        return [dot / (norm * math.sqrt(square) or 1.0) for dot, square in self.products[1:]]


def _read(tensor: StoredTensor) -> Tensor:
    with safe_open(tensor.file, framework="pt") as source:
        found: Tensor = source.get_tensor(tensor.name)
        return found


def _write(
    folder: Path, name: str, paths: Sequence[str], members: Sequence[_Member], shares: Sequence[float], dtype: str
) -> None:
    """Write the files of the average."""
    first = members[0]
    for each in stats_of(first.path):
        if not each.endswith((".safetensors", ".bin", ".index.json")) and each != "manifest.json":
            (folder / each).parent.mkdir(exist_ok=True)
            shutil.copyfile(first.path / each, folder / each)
    found = {each.dtype for member in members for each in member.files.tensors.values() if each.dtype in FLOATS}
    own = _DTYPES.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32
    kind, mean = _NAMES.get(dtype, own), _Mean(members, shares)
    meta = {
        each: torch.empty(stored.shape, dtype=kind, device="meta")
        if stored.dtype in FLOATS
        else _read(stored).to("meta")
        for each, stored in first.files.tensors.items()
    }
    write_weights(folder, meta, kind, read=mean.read)
    config = {key: value for key, value in first.config.items() if key not in (*MEAN_KEYS, *STD_KEYS, BASE_RECORD)}
    config["dtype"] = str(kind).removeprefix("torch.")
    if RECORD_KEY in config:
        config[RECORD_KEY] = {**config[RECORD_KEY], **_MEASURED}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if any(read_statistics(member.path) is not None for member in members):
        log.warning(
            "mean and standard deviation of the models' validation rewards do not hold for the average and are dropped:"
            " it cannot be used with --normalize"
        )
    _log_distance(members, mean.cosines())
    card = averaged_card(
        name, [(str(Path(*Path(path).parts[-2:])), share) for path, share in zip(paths, shares, strict=True)],
        [Path(path).expanduser() / CARD_NAME for path in paths], is_language_model=first.is_language_model,
        input_style=first.record.input_style if first.record else "chat" if first.tokenizer.chat_template else "text",
        separator=first.record.separator if first.record else "\n\n",
        attributes=first.record.attributes if first.record else (),
        adds_special_tokens=bool(first.tokenizer.cls_token),
        code_file=CODE_FILE if (folder / CODE_FILE).is_file() else "",
    )  # fmt: skip
    (folder / CARD_NAME).write_text(card, encoding="utf-8")
    apply_umask(folder)
    (folder / ".gitignore").write_text("\n".join(NOT_UPLOADED) + "\n", encoding="utf-8")
    written = [str(each.relative_to(folder)) for each in sorted(folder.rglob("*")) if each.is_file()]
    write_manifest(folder, sha256_files(folder, [each for each in written if each != ".gitignore"]))


def _log_distance(members: Sequence[_Member], cosines: Sequence[float]) -> None:
    lowest = min(cosines)
    log.info("cosine of the models' weights with those of %s: at least %.6f", members[0].name, lowest)
    if lowest < _UNRELATED:
        log.warning(
            "the weights of %s and %s have the cosine %.3f: they do not come from the same base model, and the mean of "
            "unrelated weights computes nothing useful; use an ensemble",
            members[0].name, members[1 + cosines.index(lowest)].name, lowest,
        )  # fmt: skip
    elif lowest < _FAR:
        log.warning(
            "the weights of %s and %s are far apart (cosine %.4f), so the average may be worse than each of them: "
            "compare it with them (rm-gallery evaluate), or use an ensemble",
            members[0].name, members[1 + cosines.index(lowest)].name, lowest,
        )  # fmt: skip


def _rescore(folder: Path, first: _Member) -> None:
    """Raise UserError unless transformers loads the folder and its rewards, or losses, are finite."""
    if not fits_memory(folder):
        return
    if first.is_language_model:
        noun, found = "losses", plain_losses(folder, probe_groups(first.tokenizer))
    else:
        noun, found = "rewards", rescore(folder, [first.tokenizer(text)["input_ids"] for text in PROBES])
    if not all(map(math.isfinite, found)):
        raise UserError(f"the average gives {noun} that are not finite ({found}); nothing was written")
