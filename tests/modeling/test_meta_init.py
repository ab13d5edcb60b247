"""Meta-device initialization gives the model that transformers loads, and the location of each tensor."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rm_gallery.errors import UserError
from rm_gallery.modeling import stored_layout
from rm_gallery.modeling.export import InputRecord, set_pad_token
from rm_gallery.modeling.language_model import load_language_model
from rm_gallery.modeling.meta_init import MetaInitError, init_language_model_on_meta, init_on_meta
from rm_gallery.modeling.reward_model import load_reward_model
from rm_gallery.modeling.stored_layout import MergedTensor
from tests.small import DECODERS, ENCODERS, export_model, fast_first, make_model, make_tokenizer
from tests.training.test_lora_types import save_base


@pytest.mark.parametrize("kind", DECODERS + ENCODERS)
def test_loaded_weights_are_those_that_transformers_loads(kind: str, tmp_path: Path) -> None:
    folder = make_model(kind, tmp_path)
    torch.manual_seed(3)
    loaded = load_reward_model(str(folder))
    meta, files = init_on_meta(str(folder), seed=3)
    assert all(parameter.is_meta for parameter in meta.model.parameters())
    assert (meta.has_own_head, meta.new_parts) == (loaded.has_own_head, loaded.new_parts)
    expected = loaded.model.network.state_dict()
    state = {name: torch.full_like(value, float("nan")) for name, value in expected.items()}
    files.load_into(state)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, atol=0, rtol=0, msg=name)
    buffers = dict(loaded.model.named_buffers())
    assert buffers.keys() == dict(meta.model.named_buffers()).keys()
    for name, value in meta.model.named_buffers():
        torch.testing.assert_close(value, buffers[name], atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", fast_first([*DECODERS, "gpt2", "gemma3", "qwen3_moe"]))
def test_a_language_model_is_that_of_transformers_and_its_tied_layer_one_parameter(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    if kind in DECODERS:
        make_model(kind, tmp_path, tie_word_embeddings=tied)
    else:
        save_base(kind, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true}')
    loaded = load_language_model(str(tmp_path)).model
    meta, files = init_language_model_on_meta(str(tmp_path))
    assert all(parameter.is_meta for parameter in meta.model.parameters())
    assert [*dict(meta.model.named_parameters())] == [*dict(loaded.named_parameters())], "tied parameters are one"
    expected = loaded.network.state_dict()
    state = {name: torch.full_like(value, float("nan")) for name, value in expected.items()}
    files.load_into(state)
    for name, value in [*expected.items(), *loaded.named_buffers()]:
        found = state[name] if name in state else meta.model.get_buffer(name)
        torch.testing.assert_close(found, value, atol=0, rtol=0, msg=name)
    assert meta.model.network.generation_config.to_dict() == loaded.network.generation_config.to_dict()


def test_an_output_layer_beside_the_embedding_that_it_is_tied_to_is_left_to_transformers(tmp_path: Path) -> None:
    path = make_model("qwen2", tmp_path, tie_word_embeddings=True) / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * 2}, path)
    with pytest.raises(MetaInitError, match=r"ties to model\.embed_tokens"):
        init_language_model_on_meta(str(tmp_path))
    save_file({name: each for name, each in tensors.items() if "embed" not in name}, path)
    with pytest.raises(MetaInitError, match=r"no file contains lm_head\.weight"):
        init_language_model_on_meta(str(tmp_path))


@pytest.mark.parametrize("kind", ["qwen3_moe", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_rank_reads_its_own_experts(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    opened = list[str]()

    @contextmanager
    def watched(file: Path, framework: str) -> Iterator[SimpleNamespace]:
        with safe_open(file, framework=framework) as source:
            yield SimpleNamespace(get_tensor=lambda name: opened.append(name) or source.get_tensor(name))

    monkeypatch.setattr(stored_layout, "safe_open", watched)
    experts = {"num_local_experts": 4} if kind == "mixtral" else {"num_experts": 4, "moe_intermediate_size": 24}
    config = AutoConfig.for_model(
        kind, vocab_size=264, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts_per_tok=2, pad_token_id=0, **experts,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert "model.layers.1.mlp.experts.gate_up_proj" not in load_file(tmp_path / "model.safetensors")
    expected = load_reward_model(str(tmp_path)).model.network.state_dict()
    files = init_on_meta(str(tmp_path), seed=0)[1]
    state = {name: torch.full_like(value, float("nan")) for name, value in expected.items()}
    files.load_into(state)
    assert all(torch.equal(state[name], value) for name, value in expected.items() if not name.startswith("score"))
    merged_names = [name for name in expected if "experts" in name]
    assert len(merged_names) == 4
    for name in merged_names:
        merged = files.tensors[name]
        assert isinstance(merged, MergedTensor)
        opened.clear()
        assert torch.equal(merged.read(slice(1, 3)), expected[name][1:3])
        assert {each.split(".experts.")[1][0] for each in opened} == {"1", "2"}
        assert not merged.read(slice(4, 4)).numel(), "a rank without an expert"

    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in tensors if re.search(r"experts\.2\.(up_proj|w3)", name))
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(MetaInitError, match=r"no file contains model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        init_on_meta(str(tmp_path), seed=0)


def test_the_head_depends_only_on_the_seed(qwen2_folder: Path) -> None:
    heads = [init_on_meta(str(qwen2_folder), seed=seed)[1].new["score.weight"] for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_the_head_of_a_reward_model_is_kept(qwen2_folder: Path, tmp_path: Path) -> None:
    model = load_reward_model(str(qwen2_folder)).model
    tokenizer = make_tokenizer()
    set_pad_token(model, tokenizer)
    folder = export_model(tmp_path / "reward", model, tokenizer, InputRecord("text"))
    meta, files = init_on_meta(str(folder), seed=0)
    assert meta.has_own_head and not files.new
    state = {"score.weight": torch.zeros(1, 32)}
    files.load_into(state)
    assert torch.equal(state["score.weight"], model.network.score.weight)


def copy_with(source: Path, folder: Path, *, files: dict[str, list[str]], index: bool = False) -> Path:
    """A copy of the model folder with its tensors split over these files."""
    tensors = load_file(source / "model.safetensors")
    shutil.copytree(source, folder)
    (folder / "model.safetensors").unlink()
    for file, prefixes in files.items():
        part = {name: value for name, value in tensors.items() if name.startswith(tuple(prefixes))}
        save_file(part, folder / file, metadata={"format": "pt"})
    if index:
        where = {name: file for file, prefixes in files.items() for name in tensors if name.startswith(tuple(prefixes))}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def test_only_the_shards_of_the_index_are_read(qwen2_folder: Path, tmp_path: Path) -> None:
    parts = {"a.safetensors": ["model.layers"], "b.safetensors": ["model.embed", "model.norm", "lm_head"]}
    folder = copy_with(qwen2_folder, tmp_path / "model", files=parts, index=True)
    save_file({"model.norm.weight": torch.zeros(32)}, folder / "consolidated.safetensors")
    _, files = init_on_meta(str(folder), seed=0)
    assert {each.file.name for each in files.tensors.values()} == {"a.safetensors", "b.safetensors"}
    norm = files.tensors["model.norm.weight"]
    assert (norm.file, norm.name) == (folder / "b.safetensors", "model.norm.weight")


def test_models_that_transformers_must_load_itself_raise_with_the_reason(qwen2_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(qwen2_folder / "model.safetensors")
    norm = "model.norm.weight"
    cases = {
        "no file contains model.norm.weight": {name: value for name, value in tensors.items() if name != norm},
        r"has shape \[31\], not \[32\]": {**tensors, norm: tensors[norm][:31].clone()},
        "has dtype I8": {**tensors, norm: tensors[norm].to(torch.int8)},
    }
    for number, (reason, changed) in enumerate(cases.items()):
        folder = Path(shutil.copytree(qwen2_folder, tmp_path / str(number)))
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(MetaInitError, match=reason):
            init_on_meta(str(folder), seed=0)
    folder = Path(shutil.copytree(qwen2_folder, tmp_path / "bin"))
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(MetaInitError, match=r"neither model.safetensors nor"):
        init_on_meta(str(folder), seed=0)
    folder = Path(shutil.copytree(qwen2_folder, tmp_path / "cut"))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        init_on_meta(str(folder), seed=0)


def test_a_missing_folder_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        init_on_meta(str(tmp_path / "nowhere"), seed=0)
