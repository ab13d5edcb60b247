"""Activation checkpointing changes no gradient and recomputes the expected FLOPs."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.small_models import config_of
from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.modeling.attention import dispatch
from rm_gallery.modeling.config import CheckpointingMode
from rm_gallery.modeling.packing import choose_way
from rm_gallery.modeling.parallel.apply import enable_checkpointing
from rm_gallery.modeling.reward_model import RewardModel, load_reward_model
from rm_gallery.modeling.twin import VOCABULARY, build_twin
from rm_gallery.objectives import OBJECTIVES
from tests.small import make_model, random_groups


def train_once(folder: Path, mode: CheckpointingMode | None, kernel: str) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients, and FLOPs of the forward and backward pass."""
    torch.manual_seed(1)
    model = load_reward_model(str(folder)).model.train()
    model.attention = kernel  # type: ignore[assignment]
    if mode is not None:
        enable_checkpointing(model, mode)
    batch = collate(random_groups(4))
    with FlopCounterMode(display=False) as counter:
        OBJECTIVES["bradley_terry"](model(batch), batch)[0].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients, counter.get_total_flops()


@pytest.mark.parametrize(
    "kind", ["qwen2", *(pytest.param(each, marks=pytest.mark.slow) for each in ("gemma3_text", "bert"))]
)
@pytest.mark.parametrize("kernel", ["sdpa", pytest.param("plain", marks=pytest.mark.slow)])
def test_selective_keeps_matrix_products_and_changes_no_gradient(kind: str, kernel: str, tmp_path: Path) -> None:
    folder = make_model(kind, tmp_path)
    plain, least = train_once(folder, None, kernel)
    full, most = train_once(folder, "full", kernel)
    selective, products = train_once(folder, "selective", kernel)
    for found in (full, selective):
        assert found.keys() == plain.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)
    if kernel == "sdpa":
        assert least == products < most
    else:  # the products inside plain attention are computed again
        assert least <= products < most


_SLOW = (
    "stablelm", "gemma2", "vaultgemma", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash", "flint",
    "llama4_text", "qwen2_moe", "phimoe",
)  # fmt: skip


@pytest.mark.parametrize("kind", [
    "nemotron", *(pytest.param(each, marks=pytest.mark.slow) for each in _SLOW)
])  # fmt: skip
def test_the_layout_of_a_recomputation_is_that_of_its_forward_pass(kind: str) -> None:
    """Layers of Nemotron and StableLM drop keyword arguments, and a GPU's backward pass runs in a thread of its own."""
    config = config_of(kind)
    network = build_twin(config)
    way = choose_way(config, "packed", what="model")
    dispatch.install()
    network.set_attn_implementation(dispatch.NAME)
    model = RewardModel(network, way).train()
    batch = collate(random_groups(4, vocab=VOCABULARY))
    found = []
    for mode in (None, "full", "selective"):
        if mode is not None:
            enable_checkpointing(model, mode)
        model.zero_grad()
        torch.manual_seed(0)  # routers of PhiMoE draw random numbers
        loss = OBJECTIVES["bradley_terry"](model(batch), batch)[0]
        with dispatch.carry_layout(dispatch.lay_out(collate(random_groups(5)))):  # of another batch
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        found.append([each.grad.clone() for each in model.parameters() if each.grad is not None])
    assert len(found[0]) == len(list(model.parameters()))
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], atol=1e-6, rtol=1e-5)
