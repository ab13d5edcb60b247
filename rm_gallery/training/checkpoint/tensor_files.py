"""Tensor files of a `training_state`, written and read through torch.distributed.checkpoint (DCP).

rank_0_1.safetensors, ...      tensors of one rank, about 1 GiB per file. The header says where a shard begins in its
                               tensor, under the key that torch's HuggingFaceStorageWriter uses (DCP_SHARDING_INFO).
__0_0.distcp, ..., .metadata   of earlier versions: tensors as torch.save writes them, and a pickled list of them.

Reading executes nothing from these files, whoever wrote them. The list of an earlier version is unpickled into plain
data by an unpickler that knows the names of DCP's records and refuses every other name; its tensors are loaded with
`weights_only=True`. Names, shapes and positions are checked before a tensor is read.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from rm_gallery.files import sync

SUFFIX = ".safetensors"
METADATA_NAME = ".metadata"  # of earlier versions
_SHARDS_KEY, _OFFSETS_KEY = "DCP_SHARDING_INFO", "saved_offsets"
_MAX_FILE_BYTES = 1 << 30
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class ShardWriter(HuggingFaceStorageWriter):
    """Writes the tensors of one rank as safetensors files, without a second copy of them in host memory."""

    def __init__(self, folder: Path, rank: int, *, max_file_bytes: int = _MAX_FILE_BYTES) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._folder, self._rank, self._max_file_bytes = folder, rank, max_file_bytes

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the files and flush them to disk. Raises OSError when the disk is full."""
        for number, items in enumerate(_by_size(plan.items, self._max_file_bytes), start=1):
            tensors: dict[str, Tensor] = {}
            offsets: dict[str, Any] = {}
            storages = set()
            for item in items:
                value = planner.resolve_data(item)
                if not isinstance(value, Tensor) or item.tensor_data is None:
                    raise TypeError(f"{item.index.fqn}: a training state holds tensors only")
                tensor = value.detach().to("cpu").contiguous()
                storage = tensor.untyped_storage().data_ptr()
                tensors[item.index.fqn] = tensor.clone() if storage in storages else tensor  # safetensors refuses views
                storages.add(storage)
                offsets[item.index.fqn] = {_OFFSETS_KEY: list(item.tensor_data.chunk.offsets)}
            path = self._folder / f"rank_{self._rank}_{number}{SUFFIX}"
            try:
                save_file(tensors, path, metadata={_SHARDS_KEY: json.dumps(offsets), "format": "pt"})
            except SafetensorError as error:  # how safetensors reports a full disk
                raise OSError(str(error)) from error
            sync(path)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done


def _by_size(items: Sequence[WriteItem], max_bytes: int) -> Iterator[list[WriteItem]]:
    """Consecutive items of at most `max_bytes`; a larger item is alone."""
    part: list[WriteItem] = []
    part_bytes = 0
    for item in items:
        data = item.tensor_data
        num_bytes = 0 if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize
        if part and part_bytes + num_bytes > max_bytes:
            yield part
            part, part_bytes = [], 0
        part.append(item)
        part_bytes += num_bytes
    if part:
        yield part


def open_reader(folder: Path, names: Collection[str]) -> ShardReader | EarlierReader:
    """A reader of the files `names` of a `training_state`; other files in the folder are not read.

    Raises ValueError if they do not describe every tensor completely, and OSError if they cannot be read.
    """
    if METADATA_NAME not in names and (folder / METADATA_NAME).exists():
        raise ValueError(f"{METADATA_NAME} is not listed in the manifest")
    reader = EarlierReader(folder, names) if METADATA_NAME in names else ShardReader(folder, names)
    for name, entry in reader.entries.items():
        _check_rows(name, entry)
    return reader


class ShardReader(HuggingFaceStorageReader):
    """Reads safetensors shards of any number of ranks."""

    def __init__(self, folder: Path, names: Collection[str]) -> None:
        super().__init__(str(folder))
        self._folder, self._names = folder, sorted(name for name in names if name.endswith(SUFFIX))

    @property
    def entries(self) -> dict[str, TensorStorageMetadata]:
        """Size, type and shards of each tensor, by name."""
        return dict(self._metadata.state_dict_metadata)  # type: ignore[arg-type]

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        """DCP's description of the tensors, from the headers of the files."""
        return self._metadata

    @cached_property
    def _metadata(self) -> Metadata:
        found: dict[str, _Tensor] = {}
        places: dict[MetadataIndex, Any] = {}
        for path in (self._folder / name for name in self._names):
            for name, dtype, shape, offsets in _read_header(path):
                tensor = found.setdefault(name, _Tensor(dtype))
                tensor.add(name, dtype, offsets, shape)
                places[MetadataIndex(name, offsets)] = _StorageInfo(str(path), 0, 0)
        return Metadata({name: tensor.entry() for name, tensor in found.items()}, storage_data=places)

    @cached_property
    def _files(self) -> dict[str, Any]:
        return {str(self._folder / name): safe_open(self._folder / name, framework="pt") for name in self._names}

    def read_tensor(self, name: str) -> Tensor:
        """Read one whole tensor into host memory."""
        shards = sorted(self.entries[name].chunks, key=lambda chunk: tuple(chunk.offsets))
        places = [self._metadata.storage_data[MetadataIndex(name, chunk.offsets)] for chunk in shards]
        parts = [self._files[place.relative_path].get_tensor(name) for place in places]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class EarlierReader(dcp.FileSystemReader):
    """Reads `.distcp` files of earlier versions."""

    def __init__(self, folder: Path, names: Collection[str]) -> None:
        super().__init__(folder)
        self._folder, self._names = folder, names

    @property
    def entries(self) -> dict[str, TensorStorageMetadata]:
        """Size, type and shards of each tensor, by name."""
        return dict(self._metadata.state_dict_metadata)  # type: ignore[arg-type]

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        """DCP's description of the tensors, from `.metadata`."""
        return self._metadata

    @cached_property
    def _metadata(self) -> Metadata:
        try:
            saved = _unpickle((self._folder / METADATA_NAME).read_bytes())
            entries = {name: _entry(name, entry) for name, entry in saved.fields["state_dict_metadata"].items()}
            places = dict(_place(*each) for each in saved.fields["storage_data"].items())
        except OSError:
            raise
        except Exception as error:  # a damaged pickle raises errors of any type
            raise ValueError(f"{METADATA_NAME} is not the list of tensors of a checkpoint ({error})") from error
        for name, entry in entries.items():
            for chunk in entry.chunks:
                place = places.get(MetadataIndex(name, chunk.offsets))
                if place is None or place.relative_path not in self._names:
                    raise ValueError(f"{METADATA_NAME} names no file of this checkpoint for {name}")
        return Metadata(entries, storage_data=places)  # type: ignore[arg-type]


def check_names(
    entries: Mapping[str, TensorStorageMetadata], expected: Mapping[str, Tensor], *, cast: Collection[str] = ()
) -> None:
    """Raise ValueError unless every expected tensor is saved with its shape and data type.

    cast: names of tensors that may be saved in another floating-point type, and are cast when they are read.
    """
    for name, tensor in expected.items():
        entry = entries.get(name)
        if entry is None:
            raise ValueError(f"{name} is missing")
        is_cast = name in cast and entry.properties.dtype.is_floating_point and tensor.is_floating_point()
        if entry.size != tensor.shape or (entry.properties.dtype != tensor.dtype and not is_cast):
            was = f"{entry.properties.dtype} {list(entry.size)}"
            raise ValueError(f"{name}: {was} is saved, the model has {tensor.dtype} {list(tensor.shape)}")


class _Tensor:
    """A tensor while its shards are collected."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype, self._chunks = dtype, list[ChunkStorageMetadata]()

    def add(self, name: str, dtype: torch.dtype, offsets: torch.Size, sizes: torch.Size) -> None:
        first = self._chunks[0].sizes if self._chunks else sizes
        if dtype != self._dtype or not len(offsets) == len(sizes) == len(first):
            raise ValueError(f"{name}: its shards do not fit together")
        self._chunks.append(ChunkStorageMetadata(offsets, sizes))

    def entry(self) -> TensorStorageMetadata:
        first, *rest = self._chunks
        size = [begin + length for begin, length in zip(first.offsets, first.sizes, strict=True)]
        for chunk in rest:
            size = [max(a, b + c) for a, b, c in zip(size, chunk.offsets, chunk.sizes, strict=True)]
        return TensorStorageMetadata(TensorProperties(dtype=self._dtype), torch.Size(size), self._chunks)


def _read_header(path: Path) -> Iterator[tuple[str, torch.dtype, torch.Size, torch.Size]]:
    """(name, data type, shape, offsets in the whole tensor) of each tensor of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            offsets = json.loads((file.metadata() or {})[_SHARDS_KEY])
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                place = torch.Size(offsets[name][_OFFSETS_KEY])
                yield name, _DTYPES[part.get_dtype()], torch.Size(part.get_shape()), place
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path.name} is not a file of a training state ({type(error).__name__}: {error})") from error


def _check_rows(name: str, entry: TensorStorageMetadata) -> None:
    """Raise ValueError unless the shards are consecutive rows that cover the tensor: no gap, no overlap."""
    size, row = list(entry.size), 0
    is_complete = bool(size) or len(entry.chunks) == 1
    for chunk in sorted(entry.chunks, key=lambda chunk: tuple(chunk.offsets)) if size else ():
        if 0 not in chunk.sizes:  # a rank may have no row of a small tensor
            is_complete &= [*chunk.offsets] == [row] + [0] * (len(size) - 1) and [*chunk.sizes[1:]] == size[1:]
            row += chunk.sizes[0]
    if not is_complete or (0 not in size and size[:1] != [row][: len(size)]):
        raise ValueError(f"{name}: its shards overlap, or do not cover the whole tensor")


# `.metadata` of earlier versions.

_RECORDS = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
                 "StorageMeta")
} | {("torch.distributed.checkpoint.filesystem", "_StorageInfo")}  # fmt: skip
_SKIPPED = {
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


def _unpickle(data: bytes) -> Any:
    """Unpickle records of DCP as objects with `fields`. Raises UnpicklingError for every other name."""

    class Record:
        """Of any class: unpickling creates no object of torch, so that it cannot call or change one."""

        fields: Any = None

        def __setstate__(self, state: Any) -> None:
            self.fields = state

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in _RECORDS:
                return Record
            if (module, name) in _SKIPPED:
                return lambda *_: None
            if (module, name) == ("torch", "Size"):
                return tuple
            if module == "torch" and re.fullmatch(r"[a-z]+\d+", name) and isinstance(
                dtype := getattr(torch, name, None), torch.dtype
            ):  # fmt: skip
                return dtype
            raise pickle.UnpicklingError(f"it names {module}.{name}")

    return Unpickler(io.BytesIO(data)).load()


def _entry(name: Any, entry: Any) -> TensorStorageMetadata:
    tensor = _Tensor(entry.fields["properties"].fields[0])
    for chunk in entry.fields["chunks"]:
        sizes, offsets = torch.Size(chunk.fields["sizes"]), torch.Size(chunk.fields["offsets"])
        tensor.add(str(name), entry.fields["properties"].fields[0], offsets, sizes)
    found = tensor.entry()
    if found.size != torch.Size(entry.fields["size"]) or not isinstance(found.properties.dtype, torch.dtype):
        raise ValueError(f"{name}: its shards do not fit together")
    return found


def _place(index: Any, place: Any) -> tuple[MetadataIndex, _StorageInfo]:
    name, begin, length = (place.fields[key] for key in ("relative_path", "offset", "length"))
    if not (isinstance(begin, int) and isinstance(length, int) and begin >= 0 and length >= 0):
        raise ValueError(f"{name}: its position is not a number")
    return MetadataIndex(index.fields["fqn"], torch.Size(index.fields["offset"])), _StorageInfo(name, begin, length)
