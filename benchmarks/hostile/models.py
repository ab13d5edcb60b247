"""Model folders: heads under other names, weights that are missing or damaged, code and pickles, adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.hostile.box import Box, Held, attempt, base_model, check, classifier, text_checkpoint
from rm_gallery.errors import UserError
from rm_gallery.scoring import RewardScorer


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def save(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(
        {name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewards(folder: Path) -> list[float]:
    with RewardScorer.from_folder(folder, device="cpu") as scorer:
        return scorer.score([scorer.build_group(None, ["good one", "bad", "so so so"])])[0]


def head(seed: int = 3) -> torch.Tensor:
    return torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))


def with_head(box: Box, name: str, where: str = "model.safetensors", **config: Any) -> tuple[Path, Path]:
    """A folder whose head has another name, and the same model with the head as `score`."""
    known = box.copy(classifier(), "known")
    weights = weights_of(known)
    [own] = [each for each in weights if each.startswith("score")]
    save(known, {**weights, own: head()})
    foreign = box.copy(known, "foreign")
    rest = {each: value for each, value in weights.items() if each != own}
    if where == "model.safetensors":
        save(foreign, {**rest, name: head()})
    else:
        save(foreign, rest)
        save_file({name: head()}, foreign / where)
    if config:
        edit(foreign, **config)
    return foreign, known


def same_rewards(foreign: Path, known: Path) -> str:
    found, expected = rewards(foreign), rewards(known)
    check(all(abs(a - b) < 1e-4 for a, b in zip(found, expected, strict=True)), f"{found}, not {expected}")
    return f"the same rewards, e.g. {found[0]:.4f}"


@attempt("the same rewards as with the head under its usual name")
def head_named_v_head_summary(box: Box) -> str:
    return same_rewards(*with_head(box, "v_head.summary.weight", architectures=["Qwen2ForCausalLM"]))


@attempt("the same rewards as with the head under its usual name")
def head_named_value_head_without_num_labels(box: Box) -> str:
    foreign, known = with_head(box, "value_head.weight", architectures=["Qwen2Model"])
    config = json.loads((foreign / "config.json").read_text())
    for key in ("num_labels", "id2label", "label2id"):
        config.pop(key, None)
    (foreign / "config.json").write_text(json.dumps(config))
    return same_rewards(foreign, known)


@attempt("the same rewards, or refused: the head is in a file of its own")
def head_in_a_file_of_its_own(box: Box) -> str:
    foreign, known = with_head(
        box, "v_head.summary.weight", "value_head.safetensors", architectures=["Qwen2ForCausalLM"]
    )
    try:
        return same_rewards(foreign, known)
    except UserError as error:
        return f"refused: {error}"


@attempt("the same rewards as under the usual name; the head is named, never dropped silently")
def head_under_an_invented_name(box: Box) -> str:
    foreign, known = with_head(box, "judge.out.weight", architectures=["Qwen2ForCausalLM"])
    happened = same_rewards(foreign, known)
    box.score(box.responses(), model=foreign).done("judge.out.weight")
    box.train(f"model.partial_pretrain={foreign}").done("judge.out.weight")
    return f"{happened}; judge.out.weight is named"


@attempt("refused: no head weights; named: model.new_head")
def classifier_without_head_weights(box: Box) -> str:
    folder = box.copy(classifier(), "model")
    save(folder, {name: value for name, value in weights_of(folder).items() if not name.startswith("score")})
    check(box.score(box.responses(), model=folder).status == 2, "scored with a head made up")
    return box.train(f"model.partial_pretrain={folder}").refused("new_head")


@attempt("refused: a head of several layers that the class does not have")
def head_of_two_layers(box: Box) -> str:
    folder = box.copy(classifier(), "model")
    weights = {name: value for name, value in weights_of(folder).items() if not name.startswith("score")}
    save(folder, {**weights, "score.0.weight": torch.randn(32, 32), "score.2.weight": head()})
    check(box.score(box.responses(), model=folder).status == 2, "scored")
    done = box.train(f"model.partial_pretrain={folder}")
    return done.refused("score")


@attempt("a warning names the tensor that is not read")
def tensor_that_nothing_reads(box: Box) -> str:
    folder = box.copy(base_model(), "model")
    save(folder, {**weights_of(folder), "model.layers.7.extra.weight": torch.ones(3)})
    return box.train(f"model.partial_pretrain={folder}").done("model.layers.7.extra.weight")


@attempt("refused: a tensor is missing; nothing is initialized at random")
def tensor_missing(box: Box) -> str:
    happened = ""
    for name, folder in (("base", base_model()), ("text", text_checkpoint())):
        copy = box.copy(folder, name)
        weights = weights_of(copy)
        weights.pop(next(each for each in weights if "layers.1.mlp.up_proj" in each))
        save(copy, weights)
        happened = box.train(f"model.partial_pretrain={copy}").refused("up_proj")
        box.score(box.responses(), model=copy).refused()
    return happened


@attempt("refused: a tensor has another shape than config.json says")
def tensor_of_another_shape(box: Box) -> str:
    copy = box.copy(text_checkpoint(), "model")
    weights = weights_of(copy)
    name = next(each for each in weights if "layers.0.mlp.up_proj" in each)
    save(copy, {**weights, name: weights[name][:-1]})
    box.score(box.responses(), model=copy).refused()
    return box.train(f"model.partial_pretrain={copy}").refused("up_proj")


@attempt("refused in training and in scoring: the tokenizer has more ids than the embedding")
def tokenizer_larger_than_the_embedding(box: Box) -> str:
    from transformers import AutoTokenizer

    for name, folder in (("base", base_model()), ("text", text_checkpoint())):
        copy = box.copy(folder, name)
        tokenizer = AutoTokenizer.from_pretrained(copy)
        tokenizer.add_tokens([f"zzq{n}" for n in range(40)])
        tokenizer.save_pretrained(copy)
        box.score(box.responses(), model=copy).refused()
        happened = box.train(f"model.partial_pretrain={copy}").refused("embedding")
    return happened


@attempt("refused, or the same rewards in three loads")
def special_token_beyond_the_embedding(box: Box) -> str:
    copy = box.copy(text_checkpoint(), "model")
    path = copy / "tokenizer.json"
    content = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": 5000, "content": "<far>", "special": True, **flags})
    path.write_text(json.dumps(content))
    try:
        found = {tuple(rewards(copy)) for _ in range(3)}
    except UserError as error:
        return f"refused: {error}"
    check(len(found) == 1, f"{len(found)} different rewards")
    return "the same rewards"


@attempt("refused: no code of the folder runs without model.trust_remote_code")
def code_in_the_folder(box: Box) -> str:
    copy = box.copy(text_checkpoint(), "model")
    (copy / "evil.py").write_text(f"open({str(box.path('pwned'))!r}, 'w').write('x')\nclass C: pass\n")
    code = {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.C", "AutoModel": "evil.C"}
    edit(copy, auto_map=code, model_type="evil")
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(
        json.dumps({**tokenizer, "auto_map": {"AutoTokenizer": ["evil.C", None]}})
    )
    scored, trained = box.score(box.responses(), model=copy), box.train(f"model.partial_pretrain={copy}")
    check(not box.path("pwned").exists(), "the code ran")
    scored.refused()
    return trained.refused()


@attempt("refused: nothing of a pickle runs")
def weights_as_a_pickle(box: Box) -> str:
    for name in ("pytorch_model.bin", "value_head.bin", "adapter_model.bin", "training_args.bin", "model.pt"):
        copy = box.copy(text_checkpoint(), name)
        if name == "pytorch_model.bin":
            (copy / "model.safetensors").unlink()
        (copy / name).write_bytes(box.evil_pickle())
        box.train(f"model.partial_pretrain={copy}", name=name)
        scored = box.score(box.responses(), model=copy, output=f"{name}.jsonl")
        check(not box.path("pwned").exists(), f"{name} was unpickled")
        check("Traceback" not in scored.err, f"{name}: {scored.last}")
    return "5 names, nothing ran"


@attempt("refused with status 2 and a sentence that names the file")
def damaged_weight_files(box: Box) -> str:
    content = (text_checkpoint() / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    damaged = {
        "truncated": content[: len(content) // 2], "empty": b"", "huge header": b"\xff" * 7 + b"\x7f" + content[8:],
        "not JSON": content[:8] + b"{" * length + content[8 + length :], "text": b"not weights at all",
    }  # fmt: skip
    for name, new in damaged.items():
        copy = box.copy(text_checkpoint(), name)
        (copy / "model.safetensors").write_bytes(new)
        happened = box.score(box.responses(), model=copy).refused()
        box.train(f"model.partial_pretrain={copy}").refused()
    return happened


@attempt("refused: the index names a file outside the folder")
def index_that_leaves_the_folder(box: Box) -> str:
    copy = box.copy(text_checkpoint(), "model")
    (copy / "model.safetensors").rename(box.path("outside.safetensors"))
    names = dict.fromkeys(load_file(box.path("outside.safetensors")), "../outside.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    box.score(box.responses(), model=copy).refused()
    return box.train(f"model.partial_pretrain={copy}").refused()


@attempt("refused: an adapter folder, although config.json is beside it")
def adapter_with_a_config_beside_it(box: Box) -> str:
    folder = box.path("adapter")
    folder.mkdir()
    config = json.loads((base_model() / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(base_model()), "task_type": "SEQ_CLS", "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    save_file({"base_model.model.score.weight": head()}, folder / "adapter_model.safetensors")
    for path in base_model().glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    box.score(box.responses(), model=folder).refused("adapter")
    return box.train(f"model.partial_pretrain={folder}").refused("adapter")


@attempt("refused with status 2 and a sentence")
def config_with_wrong_types(box: Box) -> str:
    happened = ""
    for key, value in (
        ("hidden_size", "32"), ("num_hidden_layers", -1), ("vocab_size", 10**12), ("num_attention_heads", 0),
        ("model_type", ["qwen2"]), ("rope_theta", None), ("id2label", [1]), ("pad_token_id", 10**9),
        ("architectures", [1]),
    ):  # fmt: skip
        copy = box.copy(text_checkpoint(), f"model-{key}")
        edit(copy, **{key: value})
        done = box.in_time(
            "score", "--model", str(copy), box.responses(), "--output", f"{key}.jsonl", "--device", "cpu"
        )
        check("Traceback" not in done.err, f"{key}={value}: traceback: {done.last}")
        check(done.status in (0, 2), f"{key}={value}: status {done.status}")
        happened = done.last if done.status == 2 else happened
    return happened


@attempt("refused with status 2: 4 attention heads cannot share 8 key-value heads")
def heads_that_cannot_be_shared(box: Box) -> str:
    copy = box.copy(text_checkpoint(), "model")
    weights = weights_of(copy)
    for name in [each for each in weights if "k_proj" in each or "v_proj" in each]:
        weights[name] = torch.cat([weights[name]] * 4)
    save(copy, weights)
    edit(copy, num_key_value_heads=8)
    box.train(f"model.partial_pretrain={copy}").refused("num_key_value_heads")
    return box.score(box.responses(), model=copy).refused("num_key_value_heads")


@attempt("refused with status 2: more labels than one are not one reward")
def several_labels(box: Box) -> str:
    from tests.scoring.models import make_classifier

    folder = make_classifier("qwen2", box.path("two"), num_labels=3, num_key_value_heads=2)
    happened = box.score(box.responses(), model=folder).refused("label")
    try:
        rewards(folder)
    except UserError:
        return happened
    raise Held("scored with the first label")
