"""Tensor files: nothing in them is executed, and what does not describe every tensor completely is refused."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from rm_gallery.training.checkpoint.state import quiet
from rm_gallery.training.checkpoint.tensor_files import ShardWriter, check_names, open_reader

TENSORS = {
    "model": {"a": torch.arange(12.0).view(4, 3), "b": torch.tensor([1.5])},
    "optimizer": {"step": torch.tensor(3.0)},
}


@pytest.fixture(autouse=True)
def no_warning_of_a_single_process() -> None:
    quiet()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A training state of one rank in two files."""
    dcp.save(TENSORS, storage_writer=ShardWriter(tmp_path, 0, max_file_bytes=50))
    assert names(tmp_path) == ["rank_0_1.safetensors", "rank_0_2.safetensors"]
    return tmp_path


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """The same as an earlier version wrote it."""
    dcp.save(TENSORS, checkpoint_id=tmp_path)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def load(folder: Path) -> dict[str, Any]:
    """Loaded by DCP into zeros."""
    state = {key: {name: torch.zeros_like(value) for name, value in part.items()} for key, part in TENSORS.items()}
    dcp.load(state, storage_reader=open_reader(folder, names(folder)))
    return state


@pytest.mark.parametrize("version", ["folder", "earlier"])
def test_what_was_written_is_read(version: str, request: Any) -> None:
    folder = request.getfixturevalue(version)
    torch.testing.assert_close(load(folder), TENSORS, rtol=0, atol=0)
    (folder / "rank_9_1.safetensors").write_bytes(b"not listed")
    listed = [name for name in names(folder) if name != "rank_9_1.safetensors"]
    assert sorted(open_reader(folder, listed).entries) == ["model.a", "model.b", "optimizer.step"]


def test_an_earlier_list_beside_the_files_of_this_version_is_refused(folder: Path) -> None:
    listed = names(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"\.metadata is not listed in the manifest"):
        open_reader(folder, listed)


def test_a_tensor_that_is_not_contiguous_or_shares_memory_is_written(tmp_path: Path) -> None:
    base = torch.arange(6.0).view(2, 3)
    state = {"a": base.t(), "b": base[1:]}
    dcp.save(state, storage_writer=ShardWriter(tmp_path, 0))
    loaded = load_file(tmp_path / "rank_0_1.safetensors")
    assert all(loaded[name].equal(state[name]) for name in state)


class Evil:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


class Builtin:
    def __reduce__(self) -> Any:
        return eval, ("open('pwned', 'w')",)


class ByTorch:
    def __reduce__(self) -> Any:
        return torch.load, ("evil.pt", None, None, False)


def raw(text: bytes) -> Callable[[], bytes]:
    return lambda: text


PICKLES: dict[str, Callable[[], bytes]] = {
    "system": lambda: pickle.dumps(Evil()),
    "eval": lambda: pickle.dumps(Builtin(), protocol=0),
    "torch.load": lambda: pickle.dumps(ByTorch()),
    "inside the list": lambda: pickle.dumps(Metadata({"model.a": Evil()}, storage_data={})),  # type: ignore[dict-item]
    "inside a position": lambda: pickle.dumps(Metadata({}, storage_data={MetadataIndex("a"): Evil()})),
    "a method of a known module": raw(b"ctorch.serialization\nload\n(S'evil.pt'\ntR."),
    "a dotted name": raw(b"\x80\x04\x8c\x05torch\x8c\x0fhub.os.system___\x93\x8c\x0ctouch pwned__\x85R."),
    "a persistent id": raw(b"Pmodel\n."),
    "an extension": raw(b"\x82\x01."),
    "attributes of a class": raw(
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n}X\x03\x00\x00\x00foo\x8c\x01ysb."
    ),
    "deep": raw(b"(" * 200_000),
    "recursive": raw(b"]q\x00h\x00a."),
    "other content": raw(b"{}"),
    "nothing": raw(b""),
    "a list": lambda: pickle.dumps([1, 2]),
    "the wrong types": lambda: pickle.dumps(Metadata({"model.a": 5}, storage_data=7)),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_in_the_list_of_tensors_is_never_executed(case: str, earlier: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(earlier)
    torch.save(Evil(), "evil.pt")
    (earlier / ".metadata").write_bytes(PICKLES[case]())
    with pytest.raises(ValueError, match=r"\.metadata is not the list of tensors of a checkpoint \("):
        open_reader(earlier, names(earlier))
    assert "pwned" not in names(earlier)


def test_a_pickle_instead_of_a_tensor_is_never_executed(earlier: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(earlier)
    file = earlier / "__0_0.distcp"
    evil = pickle.dumps(Evil())
    file.write_bytes(evil * (file.stat().st_size // len(evil) + 1))
    with pytest.raises(BaseException, match="CheckpointException"):
        load(earlier)
    torch.save(Evil(), file)
    with pytest.raises(BaseException, match="CheckpointException"):
        load(earlier)
    assert "pwned" not in names(earlier)


def metadata(**changes: Any) -> Metadata:
    """The list of one tensor of an earlier version, with one fault."""
    facts: dict[str, Any] = {
        "size": (4, 3), "offsets": (0, 0), "sizes": (4, 3), "path": "__0_0.distcp", "begin": 0, "length": 9,
    } | changes  # fmt: skip
    entry = TensorStorageMetadata(
        TensorProperties(dtype=torch.float32),
        torch.Size(facts["size"]),
        [ChunkStorageMetadata(torch.Size(facts["offsets"]), torch.Size(facts["sizes"]))],
    )
    place = dcp.filesystem._StorageInfo(facts["path"], facts["begin"], facts["length"])
    return Metadata({"a": entry}, storage_data={MetadataIndex("a", torch.Size(facts["offsets"])): place})


@pytest.mark.parametrize(
    "fault",
    [
        {"path": "../../../etc/passwd"}, {"path": "/etc/passwd"}, {"path": "__7_0.distcp"}, {"path": 5}, {"begin": -1},
        {"length": "9"}, {"begin": None}, {"size": (5, 3)}, {"sizes": (4, 4)}, {"offsets": (1, 0)},
        {"offsets": (-1, 0)},
        {"size": (2**62, 3)}, {"sizes": (4,)}, {"size": (), "offsets": (), "sizes": (1,)},
    ],
)  # fmt: skip
def test_an_earlier_list_with_a_fault_is_refused(fault: dict[str, Any], earlier: Path) -> None:
    (earlier / ".metadata").write_bytes(pickle.dumps(metadata()))
    assert open_reader(earlier, names(earlier)).entries["a"].size == (4, 3)
    (earlier / ".metadata").write_bytes(pickle.dumps(metadata(**fault)))
    with pytest.raises(ValueError, match=r"\.metadata|shards"):
        open_reader(earlier, names(earlier))


def test_objects_among_the_tensors_of_an_earlier_version_are_refused(earlier: Path) -> None:
    """DCP would load such an entry with `weights_only=False`."""
    (earlier / ".metadata").write_bytes(pickle.dumps(Metadata({"model.a": BytesStorageMetadata()}, storage_data={})))
    with pytest.raises(ValueError, match="BytesStorageMetadata"):
        open_reader(earlier, names(earlier))


ROWS = torch.arange(6.0).view(2, 3)


@pytest.mark.parametrize(
    ("offsets", "complete"),
    [
        ([[0, 0], [2, 0]], True),
        ([[2, 0], [0, 0]], True),
        ([[0, 0], [0, 0]], False),  # the same rows twice
        ([[0, 0], [1, 0]], False),  # an overlap
        ([[0, 0], [3, 0]], False),  # a gap
        ([[1, 0], [3, 0]], False),  # no beginning
        ([[0, 0], [0, 3]], False),  # columns
        ([[0, 0], [-2, 0]], False),
        ([[0, 0], [2**60, 0]], False),
        ([[0, 0], [2**70, 0]], False),
        ([[0, 0], [2]], False),
        ([[0, 0], ["2", 0]], False),
        ([[0, 0], [2.5, 0]], False),
        ([[0, 0], None], False),
        ([[0, 0], {}], False),
        ([[0, 0], [[2], 0]], False),
    ],
)
def test_shards_cover_every_row_once(offsets: list[Any], complete: bool, tmp_path: Path) -> None:
    for rank, place in enumerate(offsets):
        shards = json.dumps({"a": {"saved_offsets": place}})
        save_file({"a": ROWS + 6 * rank}, tmp_path / f"rank_{rank}_1.safetensors", {"DCP_SHARDING_INFO": shards})
    if complete:
        assert open_reader(tmp_path, names(tmp_path)).entries["a"].size == (4, 3)
        return
    with pytest.raises(ValueError, match=r"shards|is not a file of a training state"):
        open_reader(tmp_path, names(tmp_path))


def test_shards_of_other_shapes_and_types_do_not_fit_together(tmp_path: Path) -> None:
    for second in (ROWS[:, :2].contiguous(), ROWS.double(), torch.tensor(1.0), ROWS.view(1, 2, 3)):
        for rank, tensor in enumerate((ROWS, second)):
            shards = json.dumps({"a": {"saved_offsets": [2 * rank, 0, 0][: tensor.ndim]}})
            save_file({"a": tensor}, tmp_path / f"rank_{rank}_1.safetensors", {"DCP_SHARDING_INFO": shards})
        with pytest.raises(ValueError, match="shards"):
            open_reader(tmp_path, names(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x80\x04N.", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 69) + b'{"a":{"dtype":"F32","shape":[9999999999,99],"data_offsets":[0,4]}}   ' + b"\0" * 4,
        struct.pack("<Q", 58) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}   ' + b"\0" * 4,
    ],
)  # fmt: skip
def test_a_file_that_is_no_safetensors_file_of_ours_is_refused(content: bytes, folder: Path) -> None:
    (folder / "rank_0_2.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"rank_0_2\.safetensors is not a file of a training state"):
        open_reader(folder, names(folder))


def test_tensors_that_the_model_has_otherwise_are_named(folder: Path) -> None:
    entries = open_reader(folder, names(folder)).entries
    check_names(entries, {"model.a": torch.zeros(4, 3)})
    for expected, sentence in (
        ({"model.c": torch.zeros(1)}, "model.c is missing"),
        (
            {"model.a": torch.zeros(4, 2)},
            r"model.a: torch.float32 \[4, 3\] is saved, the model has torch.float32 \[4, 2\]",
        ),
        ({"model.a": torch.zeros(4, 3).half()}, r"the model has torch.float16 \[4, 3\]"),
    ):
        with pytest.raises(ValueError, match=sentence):
            check_names(entries, expected)
