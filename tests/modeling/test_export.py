"""Exported folders: damage and write errors are detected, and transformers loads the exported weights."""

from __future__ import annotations

import json
import resource
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rm_gallery.modeling.export as export_module
from rm_gallery.errors import UserError
from rm_gallery.files import check_manifest
from rm_gallery.modeling.export import (
    InputRecord,
    check_rewards,
    read_record,
    set_pad_token,
)
from rm_gallery.modeling.model_folder import quiet_transformers
from rm_gallery.modeling.reward_model import load_reward_model
from rm_gallery.modeling.twin import build_twin
from tests.small import export_model, make_model, make_tokenizer


def export(source: Path, folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    model = load_reward_model(str(source)).model
    dtype = options.pop("dtype", torch.float32)
    return export_model(folder, model, make_tokenizer(), InputRecord("text", **options), dtype=dtype)


def test_a_changed_file_is_found_by_its_hash(qwen2_folder: Path, tmp_path: Path) -> None:
    folder = export(qwen2_folder, tmp_path / "global_step_1")
    assert check_manifest(folder) is None
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert check_manifest(folder) == "model.safetensors is not what was written"
    (folder / "tokenizer.json").unlink()
    assert check_manifest(folder) == "tokenizer.json is missing"


def test_a_full_disk_raises_an_os_error(qwen2_folder: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))  # a real write error, as a full disk gives
    try:
        with pytest.raises(OSError, match="File too large"):
            export(qwen2_folder, tmp_path / "global_step_1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "global_step_1").exists()


def test_file_permissions_follow_the_umask(qwen2_folder: Path, tmp_path: Path) -> None:
    folder = export(qwen2_folder, tmp_path / "global_step_1")
    reference = tmp_path / "reference"
    reference.touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {stat.S_IMODE(reference.stat().st_mode)}


def test_wrong_rewards_raise(qwen2_folder: Path, tmp_path: Path) -> None:
    folder = export(qwen2_folder, tmp_path / "global_step_1")
    with pytest.raises(UserError, match="gives text 1 the reward"):
        from rm_gallery.modeling.export import rescore

        texts = [[9, 10, 11], [12, 13]]
        right = rescore(folder, texts)
        check_rewards(folder, texts, right, exact=True)
        check_rewards(folder, texts, [right[0], right[1] + 0.001], exact=True)


def test_bfloat16_folder_gives_nearly_the_same_rewards(qwen2_folder: Path, tmp_path: Path) -> None:
    from rm_gallery.modeling.export import rescore

    texts = [[9, 10, 11, 40, 41], [12, 13]]
    exact = rescore(export(qwen2_folder, tmp_path / "a"), texts)
    check_rewards(export(qwen2_folder, tmp_path / "b", dtype=torch.bfloat16), texts, exact, exact=False)


def test_the_input_record_is_saved_and_other_folders_have_none(qwen2_folder: Path, tmp_path: Path) -> None:
    folder = export(qwen2_folder, tmp_path / "global_step_1", append_eos=True, max_length=77)
    assert read_record(folder) == InputRecord("text", True, 77)
    assert read_record(qwen2_folder) is None
    assert read_record(tmp_path / "nowhere") is None


def test_embeddings_are_resized_for_the_pad_token_only_if_too_small(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    tight = load_reward_model(
        str(make_model("llama", tmp_path / "tight", vocab_size=size, tie_word_embeddings=False))
    ).model
    roomy = load_reward_model(str(make_model("llama", tmp_path / "roomy", vocab_size=size + 10))).model
    for model, rows in ((tight, size), (roomy, size + 10)):
        tokenizer = make_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        set_pad_token(model, tokenizer)
        assert tokenizer.pad_token == "<|pad|>" and model.network.config.pad_token_id == tokenizer.pad_token_id
        assert model.network.get_input_embeddings().num_embeddings == rows, "<|pad|> is in the vocabulary already"
    tokenizer = make_tokenizer()
    vocabulary = tokenizer.get_vocab()
    assert "<|new|>" not in vocabulary
    tokenizer.add_tokens(["<|new|>"])
    with pytest.raises(UserError, match=rf"has {size} rows, .* 1 tokens .*'<\|new\|>'.*model.resize_embeddings=true"):
        set_pad_token(tight, tokenizer)
    set_pad_token(tight, tokenizer, resize=True)
    assert tight.network.get_input_embeddings().num_embeddings == size + 1
    assert tight.network.get_input_embeddings().weight[size].any()


def test_tokenizer_config_names_a_class_that_older_servers_know(qwen2_folder: Path, tmp_path: Path) -> None:
    folder = export(qwen2_folder, tmp_path / "global_step_1")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    from transformers import AutoTokenizer

    text = "Hello <|im_start|>there"
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == make_tokenizer()(text)["input_ids"]


def test_a_model_larger_than_half_of_the_free_memory_is_not_rescored(
    qwen2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export(qwen2_folder, tmp_path / "global_step_1")
    logged: list[str] = []
    monkeypatch.setattr("rm_gallery.modeling.export.log.warning", lambda text, *values: logged.append(text % values))
    with pytest.raises(UserError):
        check_rewards(folder, [[9, 10]], [1e9], exact=True)
    size = sum(parameter.numel() for parameter in load_reward_model(str(folder)).model.parameters())
    monkeypatch.setattr("rm_gallery.modeling.export._free_memory", lambda: 2 * 4 * size - 1)
    check_rewards(folder, [[9, 10]], [1e9], exact=True)
    assert len(logged) == 1 and "not rescored" in logged[0]


def test_shards_and_index_hold_the_same_tensors_as_one_file(qwen2_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    from rm_gallery.modeling.export import write_weights

    folder = export(qwen2_folder, tmp_path / "one")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    meta = {name: value.to("meta") for name, value in state.items()}
    write_weights(folder, meta, torch.float32, read=state.__getitem__, max_shard_bytes=20_000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(value.nbytes for value in state.values())}
    assert index["weight_map"] == {name: file for file in files for name in load_file(folder / file)}
    loaded = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize("place", [3, 20, -1])
def test_a_file_that_differs_from_the_tensors_raises(
    place: int, qwen2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped bit in the length of the header, in the header, or in the last tensor."""
    original = export_module.save_file

    def flips_a_bit(tensors: Any, path: Path, **options: Any) -> None:
        original(tensors, path, **options)
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(export_module, "save_file", flips_a_bit)
    with pytest.raises(OSError, match="differs from the tensors written to it; check the disk"):
        export(qwen2_folder, tmp_path / "global_step_1")
    assert not (tmp_path / "global_step_1").exists()


@pytest.mark.parametrize("kind", ["qwen3_moe", "nomic_bert", "qwen2"])
def test_tensors_are_written_as_models_are_published(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    with quiet_transformers():
        build_twin(AutoConfig.for_model(kind)).save_pretrained(tmp_path / "published")
    model = load_reward_model(str(tmp_path / "published")).model
    folder = export_model(tmp_path / "out", model, make_tokenizer(), InputRecord("text"))
    found, wanted = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "published"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
