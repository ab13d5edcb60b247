"""The choice between packed and padded: the check sees what a wrong way would compute."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import small_models
from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.errors import UserError
from rm_gallery.modeling import packing, twin
from rm_gallery.modeling.architectures import closing_token
from rm_gallery.modeling.attention import dispatch
from rm_gallery.modeling.forward import pad_texts
from rm_gallery.modeling.model_folder import check_class, quiet_transformers
from rm_gallery.modeling.packing import Probe, choose_way
from rm_gallery.modeling.reward_model import (
    RewardModel,
    has_position_table,
    load_reward_model,
    max_positions,
    max_rotary_positions,
)
from rm_gallery.modeling.twin import VOCABULARY, build_twin, shrink
from tests.modeling.test_exactness import gradients
from tests.small import DECODERS, make_model, random_groups, whole_texts

PACKED = ("qwen3_moe", "olmo2", "phi3", "gpt2", "smollm3", "gemma2")
PACKED_SLOW = ("gpt_oss", "nemotron", "stablelm", "phimoe", "qwen2_moe")
PADDED = ("gpt_neo", "falcon", "bloom", "electra", "xlm-roberta", "distilbert")


config_of = small_models.config_of


def save_twin(kind: str, folder: Path) -> Path:
    """A small folder of this type with a head."""
    with quiet_transformers():
        network = build_twin(small_models.config_of(kind))
        network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "kind", [*PACKED, *PADDED, *(pytest.param(kind, marks=pytest.mark.slow) for kind in PACKED_SLOW)]
)
def test_every_way_gives_the_rewards_and_gradients_of_one_text_at_a_time(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = load_reward_model(str(save_twin(kind, tmp_path))).model.eval()
    assert model.padded == (kind in PADDED) and model.way.difference is not None
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    groups = random_groups(0, vocab=VOCABULARY, most=20)[:4]
    wanted = torch.cat([plain(input_ids=torch.tensor([text])).logits[:, 0] for text in whole_texts(groups)])
    found = model(collate(groups))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert wanted.std() > 0.01
    weights = torch.arange(1.0, len(wanted) + 1)
    ours = gradients(model, lambda: (model(collate(groups)) * weights).sum())
    (wanted * weights).sum().backward()
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            scale = max(1.0, float(parameter.grad.abs().max()))
            torch.testing.assert_close(
                ours[f"network.{name}"], parameter.grad, atol=1e-4 * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("kind", DECODERS)
def test_padded_decoders_give_the_packed_rewards(kind: str, tmp_path: Path) -> None:
    folder = str(make_model(kind, tmp_path))
    batch = collate(random_groups(0))
    torch.manual_seed(0)
    packed = load_reward_model(folder).model.eval()
    torch.manual_seed(0)
    padded = load_reward_model(folder, packing="padded").model.eval()
    assert (packed.padded, padded.padded) == (False, True)
    with torch.no_grad():
        padded.network.config.pad_token_id = 0
        torch.testing.assert_close(padded(batch), packed(batch), atol=1e-4, rtol=0)


_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 12, "use_sliding_window": True}
NEEDS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("gemma2", {}, ("softcap", "window")), ("gpt_oss", {}, ("sinks", "window")), ("llama4_text", {}, ("chunk",)),
    ("qwen2_moe", _WINDOWS, ("window",)), ("phimoe", {"sliding_window": 2047}, ("window",)),
    ("vaultgemma", {}, ("softcap", "window")), ("granite_swa", {}, ("sinks", "window")),
    ("granitemoe_swa", {}, ("sinks", "window")), ("mimo_v2_flash", {}, ("sinks", "window")),
    ("flint", {}, ("sinks", "window")), ("nemotron", {}, ()), ("stablelm", {}, ()),
]  # fmt: skip
"""Types whose attention has more than scaling and a mask that the call names, and what it has."""
_FAST = ("gemma2", "gpt_oss", "llama4_text")


@pytest.fixture
def nothing_tried() -> Iterator[None]:
    """The check is not answered from an earlier one, and its results are forgotten."""
    packing._tried.cache_clear()
    yield
    packing._tried.cache_clear()


@pytest.mark.usefixtures("nothing_tried")
@pytest.mark.parametrize(("kind", "values", "fields"), [
    pytest.param(*each, id=each[0], marks=() if each[0] in _FAST else pytest.mark.slow) for each in NEEDS
])  # fmt: skip
def test_the_check_sees_each_field_of_attention(
    kind: str, values: dict[str, Any], fields: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(kind, **values)
    attend = dispatch.attend
    assert choose_way(config, "packed", what="model").packed
    for field in fields:
        packing._tried.cache_clear()

        def incomplete(query: Any, key: Any, value: Any, layout: Any, spec: Any, field: str = field) -> Any:
            return attend(query, key, value, layout, replace(spec, **{field: None}))

        monkeypatch.setattr(dispatch, "attend", incomplete)
        way = choose_way(config, "auto", what="model")
        assert not way.packed and f"packed rewards of a small {kind} differ by" in way.reason, field
        monkeypatch.undo()


@pytest.mark.usefixtures("nothing_tried")
def test_the_check_sees_queries_that_are_scaled_by_their_place_in_the_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("llama4_text", attn_temperature_tuning=True)
    assert choose_way(config, "auto", what="model").packed
    packing._tried.cache_clear()
    monkeypatch.setattr(dispatch, "_temperature_correction", lambda *_: None)
    assert "packed rewards of a small llama4_text differ by" in choose_way(config, "auto", what="model").reason


@pytest.mark.parametrize("kind", ["qwen3_5_text", "falcon"])
def test_what_cannot_be_packed_falls_back_to_padded(kind: str) -> None:
    config = config_of(kind)
    way = choose_way(config, "auto", what="model")
    assert not way.packed and f"packed rewards of a small {kind} differ by" in way.reason, way
    with pytest.raises(UserError, match=r"model\.packing=packed is not possible"):
        choose_way(config, "packed", what="model")


@pytest.mark.parametrize("kind", ["mobilebert", "nystromformer", "fnet"])
def test_types_whose_rewards_depend_on_padding_are_refused(kind: str) -> None:
    with pytest.raises(UserError, match=f"rewards of {kind} depend on the padding"):
        choose_way(config_of(kind), "auto", what="model")


def test_types_that_cannot_be_run_are_refused_in_words() -> None:
    with pytest.raises(UserError, match="'gemma3' is not supported: it wraps several models"):
        check_class(config_of("gemma3"), what="model")
    with pytest.raises(UserError, match="'perceiver' is not supported: its head is none of"):
        choose_way(config_of("perceiver"), "auto", what="model")


@pytest.mark.parametrize("sizes", [packing.PACKED_TEXTS, packing.PADDED_TEXTS])
def test_the_check_fails_for_a_mask_that_is_ignored_and_for_siblings_that_are_seen(sizes: Any) -> None:
    probe = Probe(VOCABULARY, None, sizes)
    encoder = build_twin(config_of("electra"))
    probe.measure(encoder)
    assert probe.effect > packing._MIN_EFFECT
    assert probe.compare(lambda batch: packing.padded_rewards(encoder, batch)) < packing.TOLERANCE
    ids, _ = pad_texts(collate(probe._groups), 0)
    assert probe.compare(lambda _: packing.text_rewards(encoder, ids)) > 0.01
    decoder = build_twin(config_of("olmo2"))
    probe.measure(decoder)
    torch.testing.assert_close(
        probe.wanted, torch.cat([packing.text_rewards(decoder, torch.tensor([text])) for text in probe.texts])
    )
    one_text = [token for text in probe.texts for token in text]
    ends = torch.tensor([len(text) for text in probe.texts]).cumsum(0) - 1
    hidden = decoder.model(input_ids=torch.tensor([one_text])).last_hidden_state[0, ends]
    assert probe.compare(lambda _: decoder.score(hidden)[:, 0]) > 0.01


def test_a_check_that_cannot_tell_packed_texts_from_one_causal_text_accepts_no_packing(monkeypatch: Any) -> None:
    monkeypatch.setattr(packing, "as_one_text", lambda batch: batch)
    way = choose_way(config_of("olmo2", rms_norm_eps=3e-6), "auto", what="model")
    assert str(way).startswith(
        "padded: rewards of a small olmo2 do not show whether packed texts see each other; padded"
    )


def test_the_twin_keeps_scalars_and_every_kind_of_layer_and_draws_no_random_numbers() -> None:
    config = config_of("gemma3_text", num_hidden_layers=12, rope_scaling=None, query_pre_attn_scalar=77)
    before = torch.get_rng_state()
    build_twin(config)
    assert torch.equal(before, torch.get_rng_state())
    small = shrink(config)
    assert shrink(config_of("olmo2", num_hidden_layers=12)).num_hidden_layers == 2
    assert shrink(config_of("deepseek_v3", first_k_dense_replace=3)).num_hidden_layers == 4
    assert set(small.layer_types) == set(config.layer_types) and len(small.layer_types) == small.num_hidden_layers == 6
    assert small.sliding_window < 12 and small.rms_norm_eps == config.rms_norm_eps
    assert config.num_hidden_layers == 12


def test_a_model_without_a_twin_is_checked_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: Any) -> Any:
        raise packing.NoTwinError("sizes that do not fit")

    folder = str(save_twin("mpnet", tmp_path / "good")), str(save_twin("fnet", tmp_path / "bad"))
    monkeypatch.setattr(packing, "build_twin", fail)
    packing._tried.cache_clear()
    try:
        assert not load_reward_model(folder[0]).model.way.is_checked
        with pytest.raises(UserError, match="rewards of fnet depend on the padding"):
            load_reward_model(folder[1])
    finally:
        packing._tried.cache_clear()


def test_a_model_that_transformers_does_not_load_in_full_is_refused(tmp_path: Path) -> None:
    folder = str(save_twin("falcon_h1", tmp_path))
    with pytest.raises(UserError, match=r"does not initialize .*mup_vector when it loads falcon_h1"):
        load_reward_model(folder)


def test_a_model_that_ignores_its_input_is_refused(tmp_path: Path) -> None:
    folder = str(save_twin("mra", tmp_path))  # without its GPU kernel
    with pytest.raises(UserError, match="mra gives all texts the same reward"):
        load_reward_model(folder)


_OFFSET = ("camembert", "mpnet", "ibert", "markuplm")
_TABLES = (
    "albert", "bart", "bert", "big_bird", "biogpt", "codegen", "ctrl", "data2vec-text", "deberta", "distilbert",
    "electra", "ernie", "esm", "flaubert", "gpt2", "gpt_neo", "gptj", "layoutlm", "layoutlmv3", "lilt", "longformer",
    "luke", "mbart", "megatron-bert", "mvp", "opt", "plbart", "rembert", "roberta", "roberta-prelayernorm", "roc_bert",
    "roformer", "squeezebert", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip


@pytest.mark.parametrize("kind", [*_OFFSET, *(pytest.param(kind, marks=pytest.mark.slow) for kind in _TABLES)])
def test_the_longest_text_is_that_of_the_position_table(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "_MAX_POSITIONS", 64)
    with quiet_transformers():
        network = build_twin(small_models.config_of(kind))
    model = RewardModel(network, packing.Way(packed=False, reason=""))
    limit = max_positions(model)
    assert limit is not None and has_position_table(model, limit) and 60 < limit <= 64

    @torch.no_grad()
    def run(length: int) -> None:
        text = torch.full((1, length), 9)
        closing = closing_token(network.config)
        text[0, -1] = 9 if closing is None else closing
        network(input_ids=text)

    run(limit)
    with pytest.raises(Exception, match=r"out of range|out of bounds|must match|shape|size"):
        run(limit + 1)


def test_rotary_embeddings_that_depend_on_the_longest_text_have_a_limit() -> None:
    long = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    phi = config_of("phi3", max_position_embeddings=131072, original_max_position_embeddings=4096, rope_scaling=long)
    llama = config_of("llama", max_position_embeddings=300, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    assert [max_rotary_positions(each) for each in (phi, llama, config_of("qwen2"), config_of("bert"))] == [
        4096, 300, None, None,
    ]  # fmt: skip
    assert choose_way(phi, "auto", what="model").packed


@pytest.mark.slow
def test_no_type_of_the_library_is_wrong(tmp_path: Path) -> None:
    from benchmarks.models import measure, text_types

    exact = 0
    for kind, name in text_types().items():
        with quiet_transformers():
            row = measure(kind, name, tmp_path / kind, more=False)
        assert not row.is_wrong, row
        exact += row.exported <= packing.TOLERANCE
    assert exact >= 150


@pytest.mark.slow
def test_the_documented_lines_are_those_of_the_program() -> None:
    from benchmarks.model_lines import log_lines
    from benchmarks.models import ROOT

    def without_numbers(line: str) -> str:
        return re.sub(r"\d\S*e-\d+|\d+\.\d+|by \d+", "#", line)

    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    table = page.partition("## What the log says")[2].partition("## All types")[0]
    documented = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| type")]
    with quiet_transformers():
        found = log_lines()
    assert [without_numbers(line) for line in documented] == [without_numbers(line) for line in found]
    assert len(found) >= 10
