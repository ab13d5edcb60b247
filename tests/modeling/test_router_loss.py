"""`model.router_aux_loss_coef`: the loss of transformers, whatever the micro-batches, shared prompts and ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import small_models
from rm_gallery.data.batching.packed_batch import PackedBatch, collate
from rm_gallery.data.tokenization.token_group import Span, TokenGroup
from rm_gallery.errors import UserError
from rm_gallery.modeling.attention import dispatch
from rm_gallery.modeling.language_model import model_of_twin
from rm_gallery.modeling.model_folder import check_class, quiet_transformers
from rm_gallery.modeling.packing import Way, choose_way
from rm_gallery.modeling.parallel.apply import enable_checkpointing
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.modeling.router_loss import RouterLoss, check_config, token_weights
from rm_gallery.modeling.twin import VOCABULARY, build_twin
from rm_gallery.schema import Rating
from tests.small import random_groups, whole_texts

CPU = torch.device("cpu")
TYPES = (
    "mixtral", "olmoe", "gpt_oss", "phimoe", "qwen2_moe", "ernie4_5_moe", "flex_olmo", "flint", "granitemoe",
    "granitemoehybrid", "granitemoeshared", "jamba", "jetmoe", "laguna", "mellum", "minimax", "minimax_m2",
    "qwen3_5_moe_text", "qwen3_next",
)  # fmt: skip


def small(kind: str, way: Way | None = None, **values: Any) -> RewardModel:
    """A small random mixture of experts in training mode."""
    config = small_models.config_of(kind, **values)
    check_class(config, what="")
    way = way or choose_way(config, "auto", what="")
    with quiet_transformers():
        network = build_twin(config)
    if way.packed:
        dispatch.install()
        network.set_attn_implementation(dispatch.NAME)
    return training(RewardModel(network, way))


def training(model: Any) -> Any:
    """Training mode, in which PhiMoE's routers draw random numbers."""
    model.train()
    for each in model.modules():
        each.train(not type(each).__name__.endswith("Router"))
    return model


def pairs(*seeds: int) -> list[TokenGroup]:
    """Groups of a shared prompt and two responses, with one comparison."""
    groups = [group for seed in seeds for group in random_groups(seed, vocab=VOCABULARY, most=20)]
    return [TokenGroup(each.prefix, each.tails[:2], each.comparisons[:1]) for each in groups if len(each.tails) > 1]


def of_transformers(model: RewardModel, groups: list[TokenGroup]) -> tuple[Any, torch.Tensor]:
    """The language model with the same backbone, and its own loss over the whole texts, padded."""
    from transformers import AutoModelForCausalLM

    texts = whole_texts(groups)
    ids, mask = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64), torch.zeros(0)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
    plain = AutoModelForCausalLM.from_config(model.network.config, dtype=torch.float32, attn_implementation="eager")
    plain.get_decoder().load_state_dict(model.network.model.state_dict())
    return plain, training(plain)(
        input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False
    ).aux_loss


def run(model: RewardModel, loss: RouterLoss, *batches: PackedBatch) -> tuple[float, dict[str, torch.Tensor]]:
    """One step of these micro-batches: the loss and its gradients."""
    model.zero_grad(set_to_none=True)
    loss.start(batches, CPU)
    total = 0.0
    for batch in batches:
        model(batch)
        share = loss.share(batch)
        share.backward()
        total += float(share.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: Any, wanted: Any) -> None:
    assert found[0] == pytest.approx(wanted[0], abs=1e-6)
    assert any(float(each.abs().max()) > 1e-4 for each in wanted[1].values())
    for name, each in wanted[1].items():
        torch.testing.assert_close(found[1][name], each, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ["qwen3_moe", *(pytest.param(kind, marks=pytest.mark.slow) for kind in TYPES)])
def test_the_loss_and_its_gradients_are_those_of_transformers(kind: str) -> None:
    model, groups = small(kind), pairs(0)
    found = run(model, RouterLoss(model, 0.01), collate(groups))
    plain, wanted = of_transformers(model, groups)
    assert found[0] == pytest.approx(float(wanted.detach()), abs=1e-6 * max(1, wanted.item()))
    wanted.backward()
    gradients = {f"network.model.{name}": p.grad for name, p in plain.get_decoder().named_parameters()}
    compared = 0
    for name, each in found[1].items():
        if each.any():
            torch.testing.assert_close(each, gradients[name], atol=2e-6, rtol=1e-3, msg=name)
            compared += 1
    assert compared > 4


def test_micro_batches_shared_prompts_merged_groups_and_checkpointing_do_not_change_the_loss() -> None:
    model = small("qwen3_moe")
    loss = RouterLoss(model, 0.01)
    [first, *others] = pairs(0, 1)
    third = others[0].tails[1]
    merged = TokenGroup(first.prefix, [*first.tails, third], [*first.comparisons, type(first.comparisons[0])(0, 2)])
    again = TokenGroup(first.prefix, [first.tails[0], third], first.comparisons)
    apart = [TokenGroup(each.prefix[:0], [np.concatenate([each.prefix, tail]) for tail in each.tails], each.comparisons)
             for each in (first, again, *others)]  # fmt: skip
    wanted = run(model, loss, collate(apart))
    assert_same(run(model, loss, collate([merged, *others])), wanted)
    assert_same(run(model, loss, collate([first]), collate(others), collate([again]), collate([])), wanted)
    enable_checkpointing(model, "full")
    assert_same(run(model, loss, collate([merged]), collate(others)), wanted)
    model.padded = True
    model.network.set_attn_implementation("eager")
    assert_same(run(model, loss, collate([merged, *others])), wanted)
    model.eval()
    model(collate([first]))
    assert not loss._logits


def test_the_loss_reaches_trained_weights_below_a_frozen_router() -> None:
    model = small("qwen3_moe", Way(packed=False, reason=""))
    model.network.model.requires_grad_(False)
    lowest = model.network.model.layers[0].self_attn.q_proj.requires_grad_(True)
    _, gradients = run(model, RouterLoss(model, 0.01), collate(pairs(0)))
    assert set(gradients) == {"network.model.layers.0.self_attn.q_proj.weight"} and lowest.weight.grad.any()


def test_tokens_count_once_for_each_comparison_of_their_texts() -> None:
    group = random_groups(0)[3]  # five responses, ten comparisons
    group = TokenGroup(group.prefix[:2], [tail[:1] for tail in group.tails[:3]], group.comparisons[:2])  # 0 > 1, 0 > 2
    assert token_weights(collate([group]), padded=False).tolist() == [4, 4, 2, 1, 1]
    assert token_weights(collate([group]), padded=True).tolist() == [2, 2, 2, 1, 1, 1, 1, 1, 1]
    rated = replace(group, comparisons=(), ratings=[Rating(each, attributes=(1.0,)) for each in (0, 2, 2)])
    assert token_weights(collate([rated]), padded=False).tolist() == [3, 3, 1, 0, 2]
    assert token_weights(collate([rated]), padded=True).tolist() == [1, 1, 1, 0, 0, 0, 2, 2, 2]


@pytest.mark.slow
def test_of_conversations_the_loss_is_that_of_transformers() -> None:
    """Of a language model: shared turns, a conversation that the data have twice, and several micro-batches."""
    config = small_models.config_of("qwen3_moe")
    model = training(model_of_twin(build_twin(config, language_model=True), packed=True))
    loss = RouterLoss(model, 0.01)
    groups = [
        replace(each, comparisons=(), spans=[Span(0, 2, 4), Span(0, 5, 6), Span(1, 3, 4)]) for each in pairs(0, 1)[:3]
    ]
    twice = replace(groups[0], spans=[*groups[0].spans, groups[0].spans[2]])
    assert collate([twice]).target_texts.tolist() == [1, 2]
    again = TokenGroup(twice.prefix, [twice.tails[1]], (), spans=[Span(0, 3, 4)])
    found = run(model, loss, collate([twice, *groups[1:]]))
    assert_same(run(model, loss, collate([groups[0]]), collate(groups[1:]), collate([again])), found)
    model.padded = True
    model.network.set_attn_implementation("eager")
    assert_same(run(model, loss, collate([twice, *groups[1:]])), found)
    _, wanted = of_transformers(model, [again, *groups])
    assert found[0] == pytest.approx(float(wanted.detach()), abs=1e-6)


@pytest.mark.parametrize(("kind", "reason"), [
    ("qwen2", "qwen2 has no load-balancing loss of routers"), ("bert", "bert has no load-balancing loss"),
    ("deepseek_v3", "deepseek_v3 has no load-balancing loss"), ("doge", "of doge has a form of its own"),
])  # fmt: skip
def test_other_types_are_refused(kind: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"model.router_aux_loss_coef: .*{reason}"):
        check_config(small_models.config_of(kind))


def test_a_loss_that_reaches_no_trained_weight_is_refused() -> None:
    model = small("qwen3_moe", Way(packed=False, reason=""))
    model.network.model.requires_grad_(False)
    model.network.model.norm.requires_grad_(True)
    with pytest.raises(UserError, match="no router, and nothing below one, is trained"):
        RouterLoss(model, 0.01)
    dense = small("qwen3_moe", Way(packed=False, reason=""), decoder_sparse_step=100)
    with pytest.raises(UserError, match="this qwen3_moe has no layer with experts"):
        RouterLoss(dense, 0.01)
