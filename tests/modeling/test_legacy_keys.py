"""Checkpoints under transformers 4.x: the keys that it needs, and the same rewards where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from rm_gallery.cli import main
from rm_gallery.files import check_manifest
from rm_gallery.modeling.export import InputRecord, rescore, set_pad_token
from rm_gallery.modeling.legacy_keys import add_config_keys
from rm_gallery.modeling.model_folder import quiet_transformers
from rm_gallery.modeling.reward_model import load_reward_model
from rm_gallery.modeling.twin import build_twin
from tests.small import DECODERS, ENCODERS, export_model, make_model, make_tokenizer

OLD_PYTHON = Path(os.environ.get("RM_GALLERY_OLD_PYTHON", ".venv-transformers4/bin/python")).absolute()
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# With values that differ from the defaults of transformers 4.
ROPE: dict[str, dict[str, Any]] = {
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    "qwen3": {"rope_parameters": {"rope_type": "linear", "rope_theta": 3e4, "factor": 3.0}},
    "llama": {"rope_parameters": LLAMA3},
    "mistral": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "gemma3_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 2e5, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 333.0},
        }
    },
    "modernbert": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 9e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 555.0},
        }
    },
}


def exported(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    make_model(kind, folder / "base", **ROPE.get(kind, {}))
    model = load_reward_model(str(folder / "base")).model
    tokenizer = make_tokenizer(encoder=kind in ENCODERS)
    if kind in DECODERS:
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    set_pad_token(model, tokenizer)
    torch.nn.init.normal_(next(p for name, p in model.named_parameters() if p.shape == (1, 32) and "weight" in name))
    return export_model(folder / kind, model, tokenizer, InputRecord("text"))


def exported_twin(kind: str, folder: Path) -> Path:
    with quiet_transformers():
        network = build_twin(AutoConfig.for_model(kind))
        network.resize_token_embeddings(264)
        network.save_pretrained(folder / "base")
    return export_model(
        folder / kind, load_reward_model(str(folder / "base")).model, make_tokenizer(), InputRecord("text")
    )


@pytest.mark.parametrize(
    ("values", "added"),
    [
        ({"model_type": "qwen2", **ROPE["qwen2"]}, {"rope_theta": 777.0}),
        ({"model_type": "llama", **ROPE["llama"]},
         {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}),
        ({"model_type": "gemma3_text", **ROPE["gemma3_text"]},
         {"rope_theta": 2e5, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
          "rope_local_base_freq": 333.0}),
        ({"model_type": "modernbert", **ROPE["modernbert"]}, {"global_rope_theta": 9e4, "local_rope_theta": 555.0}),
        ({"model_type": "bert"}, {}),
        ({"model_type": "qwen3_moe", "num_local_experts": 4}, {"num_experts": 4}),
        # Read with old keys, these would have another base or other windowed layers.
        ({"model_type": "gpt_neox", "rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}}, {}),
        ({"model_type": "modernbert-decoder", "rope_parameters": ROPE["gemma3_text"]["rope_parameters"]}, {}),
    ],
)  # fmt: skip
def test_the_keys_of_version_4_stand_beside_those_of_version_5(values: Any, added: Any) -> None:
    config = dict(values)
    add_config_keys(config)
    identity = {"activation_fn": "torch.nn.modules.linear.Identity"}
    assert config == {**values, **added, "sentence_transformers": identity}


def test_keys_that_transformers_5_refuses_are_omitted() -> None:
    config = AutoConfig.for_model("gemma4_text").to_dict()
    add_config_keys(config)
    assert "rope_theta" not in config and "rope_scaling" not in config


def test_a_folder_written_before_is_repaired_and_still_intact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported("llama", tmp_path)
    wanted = {name: json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer_config.json")}
    written_before = {name: dict(values) for name, values in wanted.items()}
    for key in ("rope_theta", "rope_scaling", "sentence_transformers"):
        del written_before["config.json"][key]
    tokens = written_before["tokenizer_config.json"].pop("additional_special_tokens")
    written_before["tokenizer_config.json"]["extra_special_tokens"] = tokens
    manifest = json.loads((folder / "manifest.json").read_text())
    from rm_gallery.files import sha256

    for name, values in written_before.items():
        (folder / name).write_text(json.dumps(values))
        manifest["sha256"][name] = sha256(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert main(["export-legacy", str(folder)]) == 0
    assert {name: json.loads((folder / name).read_text()) for name in wanted} == wanted
    assert check_manifest(folder) is None
    assert main(["export-legacy", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}: changed config.json, tokenizer_config.json", f"{folder}: nothing to change",
    ]  # fmt: skip
    (folder / "config.json").write_text("{}")
    assert main(["export-legacy", str(folder)]) == 2
    assert "config.json is not what was written" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_rendered_chat_has_the_tokens_of_the_joined_text(kind: str, tmp_path: Path) -> None:
    """Tools render with the chat template, and tokenize that without special tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported(kind, tmp_path))
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == tokenizer("Why?\n\nBecause.")["input_ids"]


_SCORE = """
import json, sys, torch, transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForSequenceClassification.from_pretrained(folder, torch_dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in ("Why is it <|im_start|>so? " * 7, "No.")]
    with torch.no_grad():
        found = [float(model(input_ids=torch.tensor([row])).logits[0, 0]) for row in ids]
    print(json.dumps([transformers.__version__, ids, found]))
"""


@pytest.mark.slow
def test_the_rewards_are_the_same_under_transformers_4(tmp_path: Path) -> None:
    if not OLD_PYTHON.is_file():
        pytest.skip("transformers 4 is not installed: run make transformers4")
    folders = [exported(kind, tmp_path / kind) for kind in (*DECODERS, *ENCODERS)]
    for folder in folders:
        shutil.rmtree(folder.parent / "base")
    folders += [exported_twin(kind, tmp_path / kind) for kind in ("qwen2_moe", "qwen3_moe", "mixtral", "phi3")]
    command = [str(OLD_PYTHON), "-c", _SCORE, *map(str, folders)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(folders) and all(line[0].startswith("4.") for line in lines)
    for folder, (_, ids, found) in zip(folders, lines, strict=True):
        assert found == pytest.approx(rescore(folder, ids), abs=1e-4), folder.name
        assert abs(found[0] - found[1]) > 1e-2, "the rewards of the two texts differ"
