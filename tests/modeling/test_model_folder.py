"""Folders of other trainers, damaged folders, and folders without a head: loaded exactly, or an error in words."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rm_gallery.errors import UserError
from rm_gallery.modeling.meta_init import MetaInitError, init_on_meta
from rm_gallery.modeling.model_folder import check_values, load_model_config, read_model_config
from rm_gallery.modeling.reward_model import LoadedModel, load_reward_model
from rm_gallery.modeling.weight_files import read_weight_folder
from tests.small import make_model

HEAD = torch.linspace(-1, 1, 32).unsqueeze(0)
BIAS = torch.tensor([0.75])


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen2", tmp_path_factory.mktemp("backbone"))


def make_folder(
    source: Path, folder: Path, tensors: dict[str, Tensor] | None = None, *, drop: str = "", **config: Any
) -> Path:
    """A copy with more tensors, without those that begin with `drop`, and with other values in config.json."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in state.items() if not (drop and name.startswith(drop))}
    save_file({**kept, **(tensors or {})}, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def load_both(folder: Path) -> tuple[LoadedModel, Tensor]:
    """The folder loaded as a whole; its head must equal that of meta-device initialization."""
    loaded = load_reward_model(str(folder))
    meta, files = init_on_meta(str(folder), seed=0)
    assert (meta.head_name, meta.head_bias, meta.new_parts) == (loaded.head_name, loaded.head_bias, loaded.new_parts)
    state = {"score.weight": torch.zeros(1, 32)}
    files.load_into(state)
    head: Any = loaded.model.head
    assert torch.equal(state["score.weight"], head.weight)
    return loaded, head.weight.detach()


@pytest.mark.parametrize(
    ("tensors", "config", "name", "bias"),
    [
        ({"value_head.weight": HEAD}, {"value_head_prefix": "value_head"}, "value_head.weight", 0),
        ({"v_head.weight": HEAD}, {"architectures": ["Qwen2ForSequenceClassification"]}, "v_head.weight", 0),
        ({"v_head.summary.weight": HEAD, "v_head.summary.bias": BIAS}, {}, "v_head.summary.weight", 0.75),
        ({"reward_head.weight": HEAD.half(), "reward_head.bias": BIAS.half()}, {}, "reward_head.weight", 0.75),
        ({"regression_layer.weight": HEAD.bfloat16()}, {"architectures": ["X"]}, "regression_layer.weight", 0),
        ({"model.v_head.weight": HEAD}, {}, "model.v_head.weight", 0),
        ({"classifier.weight": HEAD, "classifier.bias": BIAS}, {}, "classifier.weight", 0.75),
        ({"score.weight": HEAD, "score.bias": BIAS}, {"num_labels": 1}, "score.weight", 0.75),
        ({"score.weight": HEAD}, {"architectures": ["Qwen2ForSequenceClassification"]}, "score.weight", 0),
        ({"a.weight": HEAD, "b.weight": HEAD + 1}, {"value_head_prefix": "a"}, "a.weight", 0),
    ],
)
def test_a_head_with_one_output_is_kept_under_any_name(
    tensors: dict[str, Tensor], config: dict[str, Any], name: str, bias: float, backbone: Path, tmp_path: Path
) -> None:
    loaded, weight = load_both(make_folder(backbone, tmp_path / "model", tensors, **config))
    torch.testing.assert_close(weight, tensors[name].float(), atol=0, rtol=0)
    assert (loaded.head_name, loaded.head_bias, loaded.new_parts) == (name, bias, ())
    assert getattr(loaded.model.network.config, "value_head_prefix", "score") == "score", "the name in checkpoints"


def test_a_head_beside_the_model_is_kept(backbone: Path, tmp_path: Path) -> None:
    folder = make_folder(backbone, tmp_path / "model")
    save_file({"v_head.summary.weight": HEAD, "v_head.summary.bias": BIAS}, folder / "value_head.safetensors")
    loaded, weight = load_both(folder)
    assert torch.equal(weight, HEAD) and (loaded.head_name, loaded.head_bias) == ("v_head.summary.weight", 0.75)
    save_file({"v_head.summary.weight": HEAD, "v_head.summary.bias": BIAS / 0}, folder / "value_head.safetensors")
    with pytest.raises(UserError, match=r"value_head.safetensors: v_head.summary.bias is inf"):
        load_reward_model(str(folder))
    folder = make_folder(folder, tmp_path / "twice", {"v_head.summary.weight": HEAD})
    with pytest.raises(UserError, match=r"model.safetensors and value_head.safetensors both contain v_head.summary.we"):
        load_reward_model(str(folder))


def test_code_of_the_folder_for_its_head_is_named(
    backbone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = {"auto_map": {"AutoModel": "own.OwnRewardModel"}}
    load_reward_model(str(make_folder(backbone, tmp_path / "model", {"reward_head.weight": HEAD}, **code)))
    assert "has code of its own for its reward head (auto_map of config.json), which is not run" in caplog.text


MLP = {"score.0.weight": torch.ones(32, 32), "score.0.bias": torch.ones(32), "score.2.weight": HEAD}


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (MLP, {}, r"head cannot be run \(score.0.bias \[32\], score.0.weight \[32, 32\], score.2.weight \[1, 32\]\)"),
        ({"v_head.weight": HEAD[0].long()}, {}, "head cannot be run"),
        ({"v_head.0.weight": HEAD}, {}, "head cannot be run"),
        ({"regression_layer.weight": HEAD.repeat(19, 1)}, {}, r"cannot be run \(regression_layer.weight \[19, 32\]\)"),
        ({"reward_ln.weight": HEAD[0] + 1, "reward_head.weight": HEAD}, {}, "head cannot be run"),
        ({"a.weight": HEAD, "b.weight": HEAD + 1}, {}, r"head cannot be run \(a.weight \[1, 32\], b.weight"),
        ({"v_head.weight": HEAD[:, :16].clone()}, {}, r"cannot be run \(v_head.weight \[1, 16\]\)"),
        ({"score.weight": HEAD, "v_head.weight": HEAD + 1}, {"value_head_prefix": "v_head"}, "two reward heads"),
        ({"score.weight": HEAD.repeat(2, 1)}, {}, "a classifier with 2 labels, .*model.new_head=true"),
        (
            {}, {"architectures": ["Qwen2ForSequenceClassification"]},
            r"1 tensors are missing \(first: score.weight\), .*or set model.new_head=true to train a new head",
        ),
        ({}, {"architectures": ["Qwen2ForRewardModel"]}, "1 tensors are missing"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_other_heads_are_errors_unless_a_new_one_is_asked_for(
    tensors: dict[str, Tensor], config: dict[str, Any], message: str, backbone: Path, tmp_path: Path
) -> None:
    folder = make_folder(backbone, tmp_path / "model", tensors, **config)
    with pytest.raises(UserError, match=message):
        load_reward_model(str(folder))
    with pytest.raises(UserError, match=message):
        init_on_meta(str(folder), seed=0)[1].load_into({"score.weight": torch.zeros(1, 32)})
    torch.manual_seed(3)
    loaded = load_reward_model(str(folder), new_head=True)
    meta, files = init_on_meta(str(folder), seed=3, new_head=True)
    head: Any = loaded.model.head
    assert (loaded.has_own_head, loaded.new_parts) == (meta.has_own_head, meta.new_parts) == (False, ("score.weight",))
    assert torch.equal(files.new["score.weight"], head.weight) and not torch.equal(head.weight, HEAD)


def test_a_pickled_head_is_not_read(backbone: Path, tmp_path: Path) -> None:
    folder = make_folder(backbone, tmp_path / "model")
    torch.save({"v_head.summary.weight": HEAD}, folder / "value_head.bin")
    with pytest.raises(UserError, match=r"value_head\.bin holds the reward head as a pickle.*convert it to value_head"):
        load_reward_model(str(folder))
    torch.save({**load_file(folder / "model.safetensors"), "v_head.weight": HEAD}, folder / "pytorch_model.bin")
    for name in ("model.safetensors", "value_head.bin"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"cannot be run \(v_head.weight\): .*in a safetensors file"):
        load_reward_model(str(folder))


def test_code_in_a_pickle_is_not_executed(backbone: Path, tmp_path: Path) -> None:
    class Writes:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    folder = make_folder(backbone, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Writes()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"its \.bin file is a pickle with more than tensors, .*; use safetensors"):
        load_reward_model(str(folder))
    assert not (tmp_path / "executed").exists()


def test_an_encoder_has_only_the_heads_of_its_class(tmp_path: Path) -> None:
    source = make_model("bert", tmp_path / "bert")
    folder = make_folder(source, tmp_path / "foreign", {"v_head.weight": HEAD})
    with pytest.raises(UserError, match=r"cannot be run \(v_head.weight \[1, 32\]\): it must be .* of a decoder"):
        load_reward_model(str(folder))
    trained = make_folder(source, tmp_path / "trained", {"classifier.weight": HEAD, "classifier.bias": BIAS})
    assert load_reward_model(str(trained)).head_name == "classifier.weight"
    half = make_folder(trained, tmp_path / "half", drop="pooler")
    with pytest.raises(UserError, match=r"2 tensors are missing \(first: bert.pooler.dense.bias\)"):
        load_reward_model(str(half))


def test_tensors_that_are_not_read_are_named(backbone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {
        "score.weight": HEAD,
        "critic.weight": HEAD + 1,
        "model.layers.2.mlp.up_proj.weight": torch.ones(64, 32),
        "model.embed_tokens_2.weight": torch.ones(264, 32),
        "lm_head.bias": torch.ones(264),
        "model.layers.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    folder = make_folder(backbone, tmp_path / "model", tensors)
    save_file({"x": torch.ones(1)}, folder / "more.safetensors")
    for load in (load_reward_model, lambda path: init_on_meta(path, seed=0)):
        caplog.clear()
        load(str(folder))
        names = "critic.weight, model.embed_tokens_2.weight, model.layers.2.mlp.up_proj.weight"
        assert [each.getMessage().partition(": ")[2] for each in caplog.records if each.levelno == logging.WARNING] == [
            f"3 tensors are not read, since the model has no place for them: {names}",
            "files with weights that are not read: more.safetensors",
        ]


def flat(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return write


def renamed(prefix: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        save_file({prefix + name: value for name, value in state.items()}, folder / "model.safetensors")

    return write


def shards(folder: Path, *, lost: bool) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(state, folder / "a.safetensors")
    if not lost:
        save_file({"model.norm.weight": torch.ones(32)}, folder / "b.safetensors")
    where = dict.fromkeys(state, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def shards_elsewhere(folder: Path) -> None:
    shards(folder, lost=True)
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("b.safetensors", "../b.safetensors"))


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')


def bare_adapter(folder: Path) -> None:
    adapter(folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


NORM, EMBEDDING, UP = "model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flat(lambda state: state[UP].zero_()), f"{UP} is all zero; is the download complete"),
        (flat(lambda state: state[EMBEDDING].zero_()), f"{EMBEDDING} is all zero"),
        (flat(lambda state: state[NORM][:1].fill_(float("nan"))), f"{NORM} has values that are not finite"),
        (flat(lambda state: state[UP][3:4].fill_(float("-inf"))), f"{UP} has values that are not finite"),
        (flat(lambda state: state.pop(UP)), rf"weights lack 1 tensors \(first: {UP}\)"),
        (flat(lambda state: state.update({UP: state[UP].to(torch.int8)})), rf"quantized \({UP} is I8\)"),
        (flat(lambda state: state.update({UP: state[UP].to(torch.float8_e4m3fn)})), rf"quantized \({UP} is F8_E4M3\)"),
        (flat(lambda state: state.update({"score.weight": HEAD.long()})), r"quantized \(score.weight is I64\)"),
        (flat(lambda state: state.update({f"{UP}_scale_inv": HEAD})), r"quantized \(.*weight_scale_inv"),
        (flat(lambda state: state.update({"norm.weight": state[NORM] + 1})), f"both norm.weight and {NORM}"),
        (renamed("module."), r"lack 26 tensors .*; it has module.lm_head.weight, module.model.embed_tokens.weight"),
        (renamed("base_model.model."), r"lack 26 tensors .*; it has base_model.model"),
        (lambda folder: shards(folder, lost=True), r"1 of the 2 weight files .* are missing \(first: b.safetensors\)"),
        (shards_elsewhere, r"it names ../b.safetensors, which is outside of the folder"),
        (lambda folder: shards(folder, lost=False), "a.safetensors and b.safetensors both contain model.norm.weight"),
        (flat(lambda state: state.update({UP: state[UP][:9].clone()})), r"up_proj.weight has shape \[9, 32\], but"),
        (adapter, r"both a model and an adapter \(adapter_config.json\)"),
        (bare_adapter, "holds an adapter; merge it into its base model org/base first"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "model.gguf"), "the folder has GGUF files"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_a_damaged_folder_is_an_error_in_words(
    damage: Callable[[Path], None], message: str, backbone: Path, tmp_path: Path
) -> None:
    folder = make_folder(backbone, tmp_path / "model")
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_reward_model(str(folder))
    try:  # the same, or transformers loads it as above
        loaded, files = init_on_meta(str(folder), seed=0)
    except MetaInitError:
        return
    except UserError as error:
        assert message.partition("(")[0].partition(".")[0].rstrip("\\ ") in str(error)
        return
    names = [name for name, value in loaded.model.network.state_dict().items() if value.is_meta]
    shapes = {name: value.shape for name, value in loaded.model.network.state_dict().items()}
    with pytest.raises(UserError, match=message):
        files.load_into({name: torch.empty(shapes[name]) for name in names})


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"architectures": [1]}, r"architectures of config.json is \[1\]; it must be a list of class names"),
        ({"architectures": "Qwen2Model"}, "architectures of config.json is 'Qwen2Model'"),
        ({"num_key_value_heads": 32}, "4 attention heads of config.json cannot share 32 key-value heads"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads"),
        ({"num_key_value_heads": 0}, "cannot share 0 key-value heads"),
    ],
)
def test_a_configuration_that_cannot_run_is_an_error_in_words(
    values: dict[str, Any], sentence: str, backbone: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        read_model_config(str(make_folder(backbone, tmp_path / "model", **values)), key="model")


def test_zero_rows_and_heads_are_no_damage(backbone: Path, tmp_path: Path) -> None:
    """Padding rows of an embedding, biases, token types, identity layers; the head at the start of training."""
    state = {"score.weight": torch.zeros(1, 4), "norm.bias": torch.zeros(4), "x.token_type_embeddings.weight": HEAD * 0}
    check_values({**state, "layers.1.mlp.down_proj.weight": torch.zeros(4, 4)}.items(), "model", but=("score",))
    with pytest.raises(UserError, match=r"model=x: score\.weight is all zero"):
        check_values(state.items(), "model=x")
    files = init_on_meta(str(backbone), seed=0)[1]
    file, name = files.tensors[EMBEDDING].file, files.tensors[EMBEDDING].name
    rows = load_file(file)[name]
    rows[200:] = 0
    folder = make_folder(backbone, tmp_path / "model", {EMBEDDING: rows})
    assert torch.equal(load_reward_model(str(folder)).model.network.get_input_embeddings().weight, rows)


def test_the_configuration_is_checked_with_the_weight_files(backbone: Path, tmp_path: Path) -> None:
    classifier = {"architectures": ["Qwen2ForSequenceClassification"]}  # two labels by default
    one = make_folder(backbone, tmp_path / "one", {"score.weight": HEAD}, **classifier)
    load_model_config(str(one))
    two = make_folder(backbone, tmp_path / "two", {"score.weight": HEAD.repeat(2, 1)}, **classifier)
    with pytest.raises(UserError, match="a classifier with 2 labels"):
        load_model_config(str(two))
    load_model_config(str(two), new_head=True)
    assert read_weight_folder(str(two), key="model").tensors["score.weight"].shape == (2, 32)
