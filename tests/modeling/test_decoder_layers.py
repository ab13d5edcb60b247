"""Replaced decoder layers, the last for reward tokens only, give the rewards and gradients of transformers' own.

RMS norm and rotary embedding are compared with numerical derivatives in float64 and with transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.modeling import decoder_layers
from rm_gallery.modeling.attention import dispatch
from rm_gallery.modeling.attention.dispatch import AttentionSpec, attend
from rm_gallery.modeling.decoder_layers import rms_norm, rotate
from rm_gallery.modeling.reward_model import RewardModel, load_reward_model
from rm_gallery.objectives import OBJECTIVES
from tests.small import DECODERS, fast_first, make_model, random_groups


@pytest.fixture(scope="module", params=DECODERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


def with_library_layers(model: RewardModel) -> RewardModel:
    """The same model with every `forward` of transformers."""
    for module in model.network.modules():
        vars(module).pop("forward", None)
    model._reads_only_rewards = False
    return model


def rewards_and_gradients(model: RewardModel, seed: int) -> dict[str, torch.Tensor]:
    batch = collate(random_groups(seed))
    rewards = model(batch)
    OBJECTIVES["bradley_terry"](rewards, batch)[0].backward()
    return {"rewards": rewards.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def with_full_last_layer(model: RewardModel) -> RewardModel:
    """The same model, with the last layer computed for all tokens."""
    first, *_, last = model.network.model.layers
    del last.forward
    last.self_attn.forward = MethodType(first.self_attn.forward.__func__, last.self_attn)
    model._reads_only_rewards = False
    return model


def test_attention_has_the_specification_that_the_library_asks_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soft cap, sinks and chunks included: none of these types has them, so own layers leave them out."""
    specs: list[AttentionSpec] = []

    def record(query: Tensor, *others: Any, **options: Any) -> Tensor:
        specs.append(others[3])
        return attend(query, *others, **options)

    monkeypatch.setattr(dispatch, "attend", record)
    monkeypatch.setattr(decoder_layers, "attend", record)
    model = load_reward_model(str(folder)).model.eval()
    for change in (lambda model: model, with_library_layers):
        change(model)(collate(random_groups(0)))
    own, library = [asdict(each) for each in specs[:2]], [asdict(each) for each in specs[2:]]
    assert own == library and len(own) == 2


@pytest.mark.parametrize("checkpointing", fast_first([False, True]))
@pytest.mark.parametrize(("change", "tolerance"), [(with_full_last_layer, 1e-6), (with_library_layers, 1e-5)])
def test_rewards_and_all_gradients_equal_the_full_computation(
    folder: Path, change: Callable[[RewardModel], RewardModel], tolerance: float, checkpointing: bool
) -> None:
    found = []
    for whole in (False, True):
        torch.manual_seed(1)
        model = load_reward_model(str(folder)).model.train()
        if whole:
            model = change(model)
        if checkpointing:
            model.network.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        found.append(rewards_and_gradients(model, seed=5))
    only, whole_found = found
    assert only.keys() == whole_found.keys()
    assert len(only) == 1 + len(list(model.parameters()))
    for name, value in whole_found.items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(only[name], value, atol=tolerance * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_the_last_mlp_and_norm_run_on_reward_tokens_only(folder: Path) -> None:
    model = load_reward_model(str(folder)).model
    batch = collate(random_groups(2))
    seen: list[tuple[Any, ...]] = []
    backbone = model.network.model
    for module in (backbone.layers[-1].mlp, backbone.norm, backbone.layers[0].mlp):
        module.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:2])))
    model(batch)
    num_rewards = len(batch.reward_index)
    assert seen == [(1, batch.num_tokens), (1, num_rewards), (1, num_rewards)]


def test_checkpointing_recomputes_the_last_layer(folder: Path) -> None:
    model = load_reward_model(str(folder)).model.train()
    model.network.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    calls: list[int] = []
    model.network.model.layers[-1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    rewards_and_gradients(model, seed=3)
    assert len(calls) == 2


def test_a_call_without_packed_runs_the_library_code(folder: Path) -> None:
    model = load_reward_model(str(folder)).model.eval()
    model.network.set_attn_implementation("eager")
    ids = torch.tensor([[9, 10, 11, 12]])
    with torch.no_grad():
        assert model.network.model(input_ids=ids, use_cache=False).last_hidden_state.shape == (1, 4, 32)


def test_a_layer_of_remote_code_is_not_replaced(folder: Path) -> None:
    network = load_reward_model(str(folder)).model.network
    for module in network.modules():
        vars(module).pop("forward", None)
    layer = network.model.layers[-1]
    foreign = type("ForeignLayer", (type(layer),), {"__module__": "transformers_modules.somebody"})
    layer.__class__ = foreign
    way = load_reward_model(str(folder)).model.way
    model = RewardModel(network, way)
    assert "forward" not in vars(layer)
    batch = collate(random_groups(2))
    with torch.no_grad():
        whole = model(batch)
        layer.__class__ = foreign.__bases__[0]
        torch.testing.assert_close(RewardModel(network, way)(batch), whole, atol=1e-5, rtol=0)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angles(tokens: int, size: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(tokens)[:, None] * (0.3 ** torch.arange(size // 2))[None, :]
    both = torch.cat([angle, angle], -1)
    return both.cos(), both.sin()


@pytest.mark.parametrize("shape", [(1, 7, 12), (5, 3, 8), (1, 4)])
def test_backward_passes_match_numerical_derivatives(shape: tuple[int, ...]) -> None:
    states = draw(*shape).double().requires_grad_()
    weight = draw(shape[-1], seed=1).double().requires_grad_()
    # The norm computes in float32 for every dtype, so finite differences need a large step.
    assert torch.autograd.gradcheck(lambda s, w: rms_norm(s, w, 1e-6), (states, weight), eps=1e-2, atol=1e-3)
    turned = draw(5, 3, 8).double().requires_grad_()
    cos, sin = (part.double() for part in angles(5, 8))
    assert torch.autograd.gradcheck(lambda s: rotate(s, cos, sin), (turned,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_llama(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(64, eps=1e-6).to(dtype)
    norm.weight.data = draw(64, seed=1).to(dtype)
    states = (draw(1, 50, 64, seed=2) * 3).to(dtype).requires_grad_()
    gradient = draw(1, 50, 64, seed=3).to(dtype)
    mine, theirs = rms_norm(states, norm.weight, 1e-6), norm(states)
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 8e-3)
    for a, b in zip(
        *(torch.autograd.grad(out, (states, norm.weight), gradient) for out in (mine, theirs)), strict=True
    ):
        assert (a.float() - b.float()).norm() <= (1e-6 if dtype == torch.float32 else 4e-3) * b.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotate_equals_transformers(dtype: torch.dtype) -> None:
    states = draw(9, 4, 16).to(dtype).requires_grad_()
    cos, sin = (part.to(dtype) for part in angles(9, 16))
    gradient = draw(9, 4, 16, seed=1).to(dtype)
    mine = rotate(states, cos, sin)
    theirs, _ = apply_rotary_pos_emb(states[None], states[None], cos[None], sin[None], unsqueeze_dim=2)
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    for a, b in ((mine, theirs[0]), *zip(*(torch.autograd.grad(out, states, gradient) for out in (mine, theirs[0])),
                                         strict=True)):  # fmt: skip
        torch.testing.assert_close(a, b, atol=2 * tolerance, rtol=tolerance)
