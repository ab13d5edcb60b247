"""The command: what it prints, what it advises, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest

from rm_gallery.cli import main
from rm_gallery.config import known_keys
from rm_gallery.planning.config import EstimateConfig, device_of, layout_of, load_estimate_config
from rm_gallery.planning.devices import GIB, GPUS, KINDS, USABLE
from rm_gallery.planning.model_shape import load_shape
from tests.small import text_pairs, write_pairs

pytestmark = pytest.mark.slow

SEVEN = "model=qwen2.5-7b"


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["estimate", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _layout(*overrides: str) -> tuple[str, int]:
    config = load_estimate_config(None, [SEVEN, *overrides])
    found = layout_of(config, load_shape("qwen2.5-7b"), device_of(config), one_micro_batch=False)
    return found.strategy, found.shards


def test_seven_billion_on_eight_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", SEVEN, "n_gpus=8", "gpu=h200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "fits: 66.96 of 131.1 GiB per GPU on 8 x h200; 1 epoch takes about 20.1 min"
    assert lines[3].strip() == "7.07B parameters: 28 layers of 233M, 545M outside them"
    kinds = dict(re.findall(r"^  ([a-z][a-z, 0-9]+?)  +([\d.]+)", "\n".join(lines), re.M))
    parts = [float(value) for name, value in kinds.items() if name != "total"]
    assert len(parts) == 7
    assert sum(parts) == pytest.approx(float(kinds["total"]), abs=0.05)
    assert not any("peak memory with one change" in line for line in lines)


def test_short_words_mean_the_keys_of_training(capsys: pytest.CaptureFixture[str], in_tmp: Path) -> None:
    write_pairs(Path("train.parquet"), text_pairs(20))
    short = _json(capsys, SEVEN, "data=train.parquet", "n_gpus=2")
    long = _json(capsys, "model.partial_pretrain=qwen2.5-7b", "data.train_files=train.parquet", "n_gpus=2")
    assert short == long
    assert short["data"]["num_pairs"] == 20


def test_a_training_configuration_can_be_estimated(capsys: pytest.CaptureFixture[str], in_tmp: Path) -> None:
    Path("run.yaml").write_text(
        "model: {partial_pretrain: qwen2.5-7b, enable_gradient_checkpointing: true}\n"
        "data: {val_files: not-there.parquet, max_tokens_per_micro_batch: 4096}\n"
        "trainer: {logger: [wandb], default_local_dir: /not/there}\n"
    )
    found = _json(capsys, "--config", "run.yaml", "n_gpus=4")
    assert found["micro_batch"]["tokens"] == 4096
    assert found["layout"]["checkpointing"] is True


def test_rated_responses_are_counted_instead_of_pairs(capsys: pytest.CaptureFixture[str], in_tmp: Path) -> None:
    rows = [{"prompt": f"p {n}", "response": "r" * n, "good": float(n % 3)} for n in range(1, 21)]
    write_pairs(in_tmp / "a.parquet", rows)
    options = ["data=a.parquet", "objective.name=attributes", "model.attributes=[good]", "data.train_batch_size=5"]
    assert main(["estimate", "model=qwen2.5-0.5b", *options]) == 0
    printed = capsys.readouterr().out
    assert "20 rated responses per epoch" in printed and "4 steps of 5 rated responses" in printed


def test_the_plan_of_the_data_bounds_the_micro_batch(capsys: pytest.CaptureFixture[str], in_tmp: Path) -> None:
    write_pairs(Path("train.parquet"), text_pairs(64))
    found = _json(capsys, SEVEN, "data=train.parquet", "n_gpus=4", "data.train_batch_size=16")
    assert 0 < found["micro_batch"]["tokens"] < 200
    assert found["data"]["steps"] == 4
    assert _json(capsys, SEVEN, "data=train.parquet", "pairs=640", "data.train_batch_size=16")["data"]["steps"] == 40


@pytest.mark.parametrize(
    "arguments",
    [
        (SEVEN, "n_gpus=8", "gpu=h100", "data.max_tokens_per_micro_batch=16384"),
        (SEVEN, "gpu=4090"),
        (SEVEN, "n_gpus=2", "gpu=a100-80", "model.strategy=ddp"),
        (SEVEN, "n_gpus=8", "gpu=a100-40", "model.fsdp_config.fsdp_size=2"),
        ("model=qwen2.5-72b", "n_gpus=64", "gpu=h200"),
        ("model=qwen2.5-72b", "n_gpus=8", "gpu=h100", "model.strategy=ddp", "model.fsdp_config.model_dtype=fp32"),
        ("model=roberta-large", "gpu_memory_gib=8", "data.max_length=512", "data.micro_batch_size_per_gpu=32"),
    ],
)
def test_what_is_advised_fits(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    found = _json(capsys, *arguments)
    assert not found["fits"]
    alone = [step for step in found["changes"]["alone"] if step["fits"]]
    ways = found["changes"]["together"] or [[step] for step in alone]
    assert ways
    assert not (alone and found["changes"]["together"])
    for steps in ways:
        changed = _json(capsys, *arguments, *(step["change"] for step in steps))
        assert changed["fits"]
        assert changed["memory"]["total"] <= steps[-1]["memory"]["total"] * 1.001
    for step in found["changes"]["alone"]:
        assert step["memory"]["total"] < found["memory"]["total"]


def test_the_largest_micro_batch_fits_and_one_more_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [SEVEN, "n_gpus=8", "gpu=h100"]
    largest = _json(capsys, *arguments)["micro_batch"]["largest_that_fits"]
    assert largest % 256 == 0
    for tokens, fits in ((largest, True), (largest + 256, False)):
        assert _json(capsys, *arguments, f"data.max_tokens_per_micro_batch={tokens}")["fits"] is fits


def _lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["estimate", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("arguments", "verdict"),
    [
        (
            (SEVEN, "trainer.total_epochs=2", "n_gpus=8", "gpu=h200"),
            ["fits: 66.96 of 131.1 GiB per GPU on 8 x h200; 2 epochs take about 40.2 min"],
        ),
        (
            ("model=qwen2.5-0.5b", "trainer.total_training_steps=39", "gpu=h100"),
            ["fits: 22.08 of 74.40 GiB on 1 x h100; 39 steps take about 54.0 s"],
        ),
        (
            (SEVEN,),
            [
                "does not fit: 168.5 of 74.40 GiB on 1 x h100; it would with",
                "  model.fsdp_config.cpu_offload=true, or with n_gpus=8",
            ],
        ),
        (
            ("model=qwen2.5-72b",),
            [
                "does not fit: 1,443.0 of 74.40 GiB on 1 x h100; it would with",
                "  model.enable_gradient_checkpointing=true and",
                "  model.fsdp_config.cpu_offload=true, or with",
                "  model.enable_gradient_checkpointing=true and n_gpus=32",
            ],
        ),
        (
            ("model=qwen2.5-72b", "gpu_memory_gib=1"),
            ["does not fit: 1,443.0 of 1.00 GiB on 1 x h100; use a smaller model or GPUs with", "  more memory"],
        ),
    ],
)
def test_the_verdict_comes_first(
    arguments: tuple[str, ...], verdict: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = _lines(capsys, *arguments)
    assert lines[: len(verdict) + 1] == [*verdict, ""]
    assert max(map(len, lines)) <= 80


def test_a_run_without_a_margin_of_5_percent_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    total = _json(capsys, SEVEN)["memory"]["total"] / 2**30
    for factor, fits in ((1.04, False), (1.06, True)):
        arguments = (SEVEN, f"gpu_memory_gib={factor * total}")
        found = _json(capsys, *arguments)
        assert found["fits"] is fits
        assert (found["changes"] is None) is fits
        assert (found["micro_batch"]["largest_that_fits"] >= found["micro_batch"]["tokens"]) is fits
        verdict = _lines(capsys, *arguments)[0]
        assert verdict.startswith("fits: " if fits else "does not fit: ")
        assert (", without a margin of 5%; it would" in verdict) is not fits


def test_every_gpu_can_be_named_and_its_figures_are_documented() -> None:
    table = Path("docs/estimate.md").read_text()
    assert known_keys(EstimateConfig)["gpu"] == Literal[KINDS]
    for name, found in GPUS.items():
        bf16 = f"{found.bf16_flops / 1e12:,.5g}" if found.has_bf16 else "none"
        figures = (found.memory / USABLE / GIB, bf16, found.fp32_flops / 1e12, found.link / 1e9, found.network / 1e9)
        row = "".join(f" {each if isinstance(each, str) else format(each, ',.5g')} |" for each in figures)
        assert f"| `{name}` |{row} {found.source}" in table


def test_a_gpu_without_bf16_units_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    small = ("model=qwen2.5-0.5b", "gpu=T4")
    [note] = _json(capsys, *small, "model.fsdp_config.model_dtype=bf16")["notes"]
    assert note.startswith("t4 has no bf16 units")
    assert not _json(capsys, *small)["notes"], "auto is fp32 there"
    changes = _json(capsys, *small, "model.fsdp_config.model_dtype=fp32")["changes"]["alone"]
    assert "model.fsdp_config.model_dtype=bf16" not in [step["change"] for step in changes]


@pytest.mark.parametrize(
    ("overrides", "layout"),
    [
        (["n_gpus=1"], ("none", 1)),
        (["n_gpus=1", "model.strategy=fsdp2"], ("none", 1)),
        (["n_gpus=1", "model.fsdp_config.cpu_offload=true"], ("fsdp2", 1)),
        (["n_gpus=8"], ("fsdp2", 8)),
        (["n_gpus=8", "model.strategy=fsdp"], ("fsdp2", 8)),
        (["n_gpus=8", "model.strategy=ddp"], ("ddp", 1)),
        (["n_gpus=8", "model.fsdp_config.fsdp_size=4"], ("fsdp2", 4)),
        (["n_gpus=8", "model.fsdp_config.fsdp_size=1"], ("ddp", 1)),
        (["n_gpus=8", "gpu_memory_gib=1000"], ("ddp", 1)),
        (["n_gpus=8", "gpu_memory_gib=1000", "model.fsdp_config.param_offload=true"], ("fsdp2", 8)),
        (["n_gpus=2", "gpu=cpu", "gpu_memory_gib=99", "model.fsdp_config.cpu_offload=true"], ("fsdp2", 2)),
    ],
)
def test_the_strategy_is_the_one_that_training_runs(overrides: list[str], layout: tuple[str, int]) -> None:
    assert _layout(*overrides) == layout


def test_a_slow_link_sets_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["data.train_batch_size=8", "n_gpus=8", "gpu=4090"]
    assert main(["estimate", SEVEN, *few]) == 0
    assert "limited by communication" in capsys.readouterr().out
    epoch = _json(capsys, SEVEN, *few)["epoch"]
    assert epoch["seconds"] == epoch["communication_seconds"] > epoch["compute_seconds"]


def test_time_goes_with_pairs_rate_and_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    def seconds(*arguments: str) -> float:
        return _json(capsys, SEVEN, "gpu=h200", *arguments)["epoch"]["compute_seconds"]

    once = seconds("n_gpus=8")
    assert seconds("n_gpus=8", "pairs=200000") == pytest.approx(2 * once)
    assert seconds("n_gpus=8", "mfu=0.8") == pytest.approx(once / 2)
    assert seconds("n_gpus=16") == pytest.approx(once / 2)


def test_notes_name_what_training_would_refuse(capsys: pytest.CaptureFixture[str], in_tmp: Path) -> None:
    assert "set data.max_length=512" in _json(capsys, "model=roberta-base")["notes"][0]
    write_pairs(Path("train.parquet"), [{"chosen": "a" * 4000, "rejected": "b" * 4000}])
    [note] = _json(capsys, SEVEN, "data=train.parquet", "data.max_tokens_per_micro_batch=100")["notes"]
    assert "the longest group has 2000 tokens" in note


@pytest.mark.parametrize(
    ("arguments", "problems"),
    [
        ([], ["model is not set"]),
        ([SEVEN, "gpu=h300"], ["gpu=h300: must be one of b200, h200, h100"]),
        ([SEVEN, "n_gpus=0", "mfu=nan"], ["n_gpus=0: must be", "mfu=nan: must be a finite number"]),
        ([SEVEN, "n_gpus=two"], ["n_gpus='two': must be an integer"]),
        ([SEVEN, "n_gpus=true"], ["n_gpus=true: must be a number"]),
        ([SEVEN, "mfu=1.5", "gpu_memory_gib=-1"], ["gpu_memory_gib=-1: must be", "mfu=1.5: must be"]),
        ([SEVEN, "n_gpu=8"], ["n_gpu: unknown key. Did you mean 'n_gpus'?"]),
        ([SEVEN, "model.stratgy=ddp"], ["model.stratgy: unknown key. Did you mean 'model.strategy'?"]),
        ([SEVEN, "n_gpus=6", "model.fsdp_config.fsdp_size=4"], ["model.fsdp_config.fsdp_size=4 does not divide"]),
        (
            [SEVEN, "n_gpus=2", "model.strategy=ddp", "model.fsdp_config.cpu_offload=true"],
            ["model.strategy=ddp cannot"],
        ),
        ([SEVEN, "data=no.parquet"], ["data.train_files=no.parquet: no such file"]),
        ([SEVEN, "data.max_length=100", "prompt_tokens=90", "response_tokens=20"], ["prompt_tokens=90 with response"]),
        ([SEVEN, "prompt_tokens=5000"], ["prompt_tokens=5000 with response_tokens=1: together more than"]),
        ([SEVEN, "data.max_tokens_per_micro_batch=0"], ["data.max_tokens_per_micro_batch=0: must be at least 1"]),
        ([SEVEN, "tokenizer=nowhere", "data=a.parquet"], ["tokenizer=nowhere: no such folder"]),
        ([SEVEN, "nothing"], ["'nothing': an override is written key=value"]),
    ],
)
def test_mistakes_end_with_2_and_a_sentence_each(
    arguments: list[str], problems: list[str], capsys: pytest.CaptureFixture[str], in_tmp: Path
) -> None:
    write_pairs(Path("a.parquet"), text_pairs(1))
    assert main(["estimate", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == len(problems)
    for line, problem in zip(lines, problems, strict=True):
        assert line.startswith(f"rm-gallery: error: {problem}")


def test_a_known_shape_is_estimated_without_a_network(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a file was asked for")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    assert _json(capsys, "model=Qwen/Qwen2.5-7B-Instruct")["model"]["parameters"] == 7_070_622_720


def test_every_own_key_is_named_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["estimate", "--help"])
    text = capsys.readouterr().out
    own = [key for key in known_keys(EstimateConfig) if "." not in key]
    assert [key for key in own if key not in text and key not in ("data", "objective", "optim", "trainer")] == []
    assert [kind for kind in KINDS if kind not in text] == []


@pytest.mark.parametrize(
    ("overrides", "tokens"),
    [
        ([], (300, 350)),
        (["data.max_length=130"], (60, 70)),
        (["data.max_length=1"], (0, 1)),
        (["prompt_tokens=2000"], (2000, 350)),
        (["prompt_tokens=4000"], (4000, 96)),
        (["response_tokens=600"], (300, 600)),
        (["response_tokens=4000"], (96, 4000)),
        (["prompt_tokens=0", "response_tokens=7"], (0, 7)),
    ],
)
def test_without_data_a_pair_has_stated_lengths(overrides: list[str], tokens: tuple[int, int]) -> None:
    assert load_estimate_config(None, [SEVEN, *overrides]).assumed_tokens == tokens
