"""The safetensors files of an exported folder, written and checked one tensor at a time.

Weights that are cut over processes are gathered here, one tensor after the other, and rank 0 writes them: no device
and no host ever holds more than a file's worth beside its own part.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from rm_gallery.distributed import rank, turn

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FILE_BYTES = 5_000_000_000  # of one file; a larger tensor is alone


def write_weights(
    folder: Path, state: Mapping[str, Tensor], dtype: torch.dtype, *, file_bytes: int = _FILE_BYTES,
    read: Callable[[str], Tensor] | None = None,
) -> None:  # fmt: skip
    """Make the folder and write `model.safetensors`, or several files and an index; floating tensors as `dtype`.

    read: gives the values of tensors on the meta device, each when its turn comes.
    Every process must call it with the same names, unless no tensor is cut over processes; rank 0 writes. The files
    are read again and compared by hash.
    Raises OSError on rank 0, once all tensors were gathered, when they cannot be written or came out damaged.
    """
    files = _plan_files(state, dtype, file_bytes)
    hashes: dict[str, str] = {}
    waiting: dict[str, Tensor] = {}
    problem: Exception | None = None
    for name, tensor in _whole_tensors(state, dtype, read):
        if problem:
            continue  # the others still need this process to gather
        waiting[name] = tensor
        file = files.of[name]
        if len(waiting) == len(files.names[file]):
            try:
                hashes.update((each, tensor_hash(waiting[each])) for each in waiting)
                folder.mkdir(parents=True, exist_ok=True)
                save_file(waiting, folder / file, metadata={"format": "pt"})
            except (OSError, SafetensorError) as error:  # the second is how the library reports a disk that is full
                problem = error
            waiting = {}
    if problem:
        raise OSError(str(problem)) from problem
    if rank() == 0:
        if len(files.names) > 1:
            index = {"metadata": {"total_size": files.total_bytes}, "weight_map": files.of}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _compare_hashes(folder, hashes)


class _Files:
    """Which tensor goes into which file, in the order of the state."""

    def __init__(self, groups: list[list[str]], total_bytes: int) -> None:
        count = len(groups)
        numbered = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        self.names = dict(zip(numbered if count > 1 else [WEIGHTS], groups, strict=True))
        self.of = {name: file for file, names in self.names.items() for name in names}
        self.total_bytes = total_bytes


def _plan_files(state: Mapping[str, Tensor], dtype: torch.dtype, file_bytes: int) -> _Files:
    groups: list[list[str]] = [[]]
    size = total = 0
    for name, tensor in state.items():
        item = dtype.itemsize if tensor.is_floating_point() else tensor.dtype.itemsize
        needed = math.prod(tensor.shape) * item
        if groups[-1] and size + needed > file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += needed
        total += needed
    return _Files(groups, total)


def _whole_tensors(
    state: Mapping[str, Tensor], dtype: torch.dtype, read: Callable[[str], Tensor] | None
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor whole, on the host of rank 0, in the type that is written; the other processes help to gather.

    Gathered in that type too: bfloat16 is half of float32.
    """
    for name, tensor in state.items():
        is_cut = isinstance(tensor, DTensor)
        if rank() and not is_cut:
            continue
        if read is not None and tensor.is_meta:
            tensor = read(name)
        tensor = tensor.detach()
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        if is_cut:
            turn(f"gathering {name}")
            assert isinstance(tensor, DTensor)
            tensor = tensor.full_tensor()
        if rank() == 0:
            yield name, tensor.to("cpu").contiguous()


def _compare_hashes(folder: Path, hashes: Mapping[str, str]) -> None:
    seen = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name in hashes and tensor_hash(tensors.get_tensor(name)) != hashes[name]:
                    raise OSError(f"{file}: tensor {name} came out damaged; check the disk")
                seen.add(name)
    lost = set(hashes) - seen
    if lost:
        raise OSError(f"{folder}: {len(lost)} tensors are missing from the file (first: {min(lost)})")


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a host tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
