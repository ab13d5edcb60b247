"""The weight files of a model folder: name, shape and dtype of each tensor, read from the headers alone.

Loads no torch and no transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rm_gallery.errors import UserError, one_line
from rm_gallery.modeling.config import Quantization

_INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights, as safetensors writes them; all others are quantized."""
BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|attn\.(masked_)?bias)$")
"""Tensors that older checkpoints contain and the model computes itself."""
_QUANTIZED = (
    "qweight", "qzeros", "scales", "g_idx", "weight_scale", "weight_scale_inv", "weight_packed", "input_scale",
    "absmax", "quant_map", "SCB",
)  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000  # the library's limit
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUANTIZATION_RECORD = "rm_gallery_quantization"
"""Key of an adapter's config.json with the arguments of `BitsAndBytesConfig`."""
_HEAD_FILE = "value_head.safetensors"
_ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "adapter_model.bin")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: F32, BF16, ..."""

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)}"


@dataclass(frozen=True)
class WeightFolder:
    """The safetensors files of a model folder."""

    folder: Path
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    """Those of the files that transformers loads; empty for a folder with other weight files."""
    head_file: Mapping[str, StoredTensor] = field(default_factory=dict)
    """Those of `value_head.safetensors`, which LLaMA-Factory writes beside the model."""
    other_files: tuple[str, ...] = ()
    """Names of files with weights that are not read."""


def read_weight_folder(path: str, *, key: str) -> WeightFolder:
    """The headers of a local model folder or of a model of the hub, whose safetensors files are downloaded.

    Raises UserError for a damaged file, a missing shard, and a tensor that several shards contain.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = _download(path)
        if not folder.is_dir():
            return WeightFolder(folder)
        if (folder / ADAPTER_CONFIG).is_file():
            raise UserError(
                f"{key}={path}: the hub model is an adapter; run hf download {path} --local-dir FOLDER, and name FOLDER"
            )
    what = f"{key}={path}"
    files = _loaded_files(folder, what)
    head_file = folder / _HEAD_FILE
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _read_header(file, what).items():
            if name in tensors:
                raise UserError(
                    f"{key}={path}: {tensors[name].file.name} and {file.name} both contain {name}; copy the folder "
                    "again"
                )
            tensors[name] = tensor
    head = _read_header(head_file, what) if head_file.is_file() else {}
    if twice := sorted(set(head) & set(tensors)):
        raise UserError(
            f"{what}: {tensors[twice[0]].file.name} and {head_file.name} both contain {twice[0]}; delete one of them"
        )
    known = {*files, head_file}
    others = [each.name for each in sorted(folder.glob("*.safetensors")) if each not in known]
    pickles = [each.name for each in sorted(folder.glob("value_head.bin"))]
    # Mistral's own format of the same weights.
    return WeightFolder(folder, tensors, head, (*(each for each in others if "consolidated" not in each), *pickles))


def _download(path: str) -> Path:
    """The folder of a hub model in the local cache; `path` itself if there is none."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                path,
                allow_patterns=["*.safetensors", "*.safetensors.index.json", ADAPTER_CONFIG],
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except Exception:
        return Path(path)  # transformers loads it, or reports why it cannot


def _loaded_files(folder: Path, what: str) -> list[Path]:
    """The files that transformers would load: model.safetensors, or the shards that the index names; [] for neither."""
    index = folder / _INDEX
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of weight files ({one_line(error)}); copy the folder again") from error
    if outside := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise UserError(f"{index}: it names {outside[0]}, which is outside of the folder; copy the folder again")
    lost = [name for name in names if not (folder / name).is_file()]
    if lost:
        raise UserError(
            f"{what}: {len(lost)} of the {len(names)} weight files that {_INDEX} names are missing (first: {lost[0]}); "
            "is the download complete?"
        )
    return [folder / name for name in names]


def _read_header(file: Path, what: str) -> dict[str, StoredTensor]:
    """Layout of the file: length of the header (8 bytes, little-endian), header (JSON), tensors."""
    try:
        with file.open("rb") as source:
            length = int.from_bytes(source.read(8), "little")
            if not 0 < length <= min(_MAX_HEADER_BYTES, file.stat().st_size):
                raise ValueError("it has no header")
            header = json.loads(source.read(length))
        header.pop("__metadata__", None)
        found = {
            name: StoredTensor(file, name, tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()
        }
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != file.stat().st_size:
            raise ValueError(f"it has {file.stat().st_size} bytes instead of {end}")
        return found
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(f"{what}: {file.name} cannot be read ({one_line(error)}); copy it again") from error


@dataclass(frozen=True)
class AdapterFiles:
    """The files of an adapter (LoRA)."""

    config: Mapping[str, Any]
    """adapter_config.json."""
    tensors: Mapping[str, StoredTensor]
    head_file: Mapping[str, StoredTensor] = field(default_factory=dict)
    """Those of `value_head.safetensors`, which LLaMA-Factory writes beside the adapter."""
    other_files: tuple[str, ...] = ()
    """Names of files with a head that are not read."""
    model_config: Mapping[str, Any] = field(default_factory=dict)
    """config.json of the folder, or {}."""

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """How the base model was quantized in training (arguments of `BitsAndBytesConfig`); None if it was not."""
        found: Mapping[str, Any] | None = self.model_config.get(QUANTIZATION_RECORD)
        return found

    @property
    def base(self) -> str:
        """Folder or hub name of the base model, or ""."""
        return str(self.config.get("base_model_name_or_path") or "")


def read_adapter_files(path: str, *, key: str) -> AdapterFiles | None:
    """The configuration and the headers of an adapter; None for a folder without one.

    Raises UserError for a folder that holds both a model and an adapter, an unreadable file, and a pickle.
    """
    folder = Path(path).expanduser()
    found = [name for name in _ADAPTER_FILES if (folder / name).is_file()]
    if not found:
        return None
    if (folder / "model.safetensors").is_file() or (folder / _INDEX).is_file():
        raise UserError(
            f"{key}={path}: the folder holds both a model and an adapter ({', '.join(found)}); if the adapter is "
            "merged into the model, delete its files, otherwise merge it first"
        )
    try:
        values = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{key}={path}: the folder holds an adapter, and its {ADAPTER_CONFIG} cannot be read ({one_line(error)}); "
            "copy it again"
        ) from error
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file() and found[1:]:
        raise UserError(
            f"{key}={path}: the folder holds an adapter as a pickle ({found[1]}), which can execute code and is not "
            f"read; convert it to {ADAPTER_WEIGHTS}"
        )
    tensors, head = (
        _read_header(file, f"{key}={path}") if file.is_file() else {} for file in (weights, folder / _HEAD_FILE)
    )
    others = tuple(each.name for each in folder.glob("value_head.bin"))
    return AdapterFiles(values, tensors, head, others, _read_config(folder / "config.json"))


def _read_config(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # transformers reports what it cannot read
        return {}
    return values if isinstance(values, dict) else {}


def kind_of_quantization(settings: Mapping[str, Any] | None) -> Quantization:
    """The kind that a record of `AdapterFiles.quantization` describes; None without a record."""
    if not settings:
        return None
    return "nf4" if settings.get("load_in_4bit") else "int8"


def tokenizer_folder(path: str, *, key: str, base: str | None = None) -> str:
    """Where the tokenizer of a model is: an adapter without one has that of its base model (`base`, or its own)."""
    files = read_adapter_files(path, key=key)
    if files is None or (Path(path).expanduser() / "tokenizer_config.json").is_file():
        return path
    return base or files.base or path


def backbone_folder(path: str, *, key: str, base: str | None = None) -> str:
    """Where the configuration of a model is: for an adapter that of its base model (`base`, or its own)."""
    files = read_adapter_files(path, key=key)
    return path if files is None else base or files.base or path


def check_not_adapter(path: str, *, key: str) -> None:
    """Raise UserError, naming the base model, for a folder with an adapter (LoRA)."""
    files = read_adapter_files(path, key=key)
    if files is not None:
        into = f"its base model {files.base}" if files.base else "its base model"
        raise UserError(
            f"{key}={path}: the folder holds an adapter; merge it into {into} first (rm-gallery merge), and use the "
            "merged folder"
        )


def check_not_quantized(files: WeightFolder, config: Any, path: str, *, key: str) -> None:
    """Raise UserError for quantized weights that the configuration does not declare: they would be read as numbers."""
    if getattr(config, "quantization_config", None):
        return  # transformers reads these, or reports why it cannot
    for name, tensor in files.tensors.items():
        is_index = tensor.dtype == "I64" and not name.endswith("weight")  # a table of indices (DeepSeek V4)
        is_float = tensor.dtype in FLOATS or is_index or len(tensor.shape) < 2 or BUFFERS.search(name)
        if name.rpartition(".")[2] in _QUANTIZED or not is_float:
            raise UserError(
                f"{key}={path}: the weights are quantized ({name} is {tensor.dtype}), and config.json has no "
                "quantization_config; use the folder with float weights"
            )


def list_names(names: Iterable[str], limit: int = 3) -> str:
    """`a, b, c and 4 more`."""
    ordered = sorted(names)
    rest = len(ordered) - limit
    return ", ".join(ordered[:limit]) + (f" and {rest} more" if rest > 0 else "")
