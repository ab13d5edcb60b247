"""Losses of a language model: packed equals one text at a time, and chunks of logits equal whole ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.tokenization.token_group import Span, TokenGroup
from rm_gallery.errors import UserError
from rm_gallery.modeling.cross_entropy import LogitScale, target_losses
from rm_gallery.modeling.language_model import language_model_way, load_language_model
from tests.small import DECODERS, fast_first, make_model


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_chunks_give_the_loss_and_gradients_of_whole_logits(softcap: float | None, rows: int) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((50, 8), (30, 8), (30,))]
    targets, weights = torch.randint(30, (50,)), torch.randint(0, 4, (50,)).double()
    hidden, weight, bias = parts
    scale = LogitScale(0.7, softcap)
    found = target_losses(hidden, weight, bias, targets, weights, scale, chunk_logits=rows * 30)
    gradients = torch.autograd.grad(found.total.double() / 3, parts)
    logits = (hidden @ weight.T + bias) * 0.7
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, reduction="none")
    wanted = torch.autograd.grad((losses * weights).sum() / 3, parts)
    torch.testing.assert_close(found.each.double(), losses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.total.double(), (losses * weights).sum(), atol=1e-4, rtol=1e-6)
    assert torch.equal(found.correct, logits.argmax(1) == targets)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def conversations() -> list[TokenGroup]:
    """Texts with and without a common prefix, whose targets begin in it; the last text is listed twice."""
    draw = np.random.default_rng(1)
    groups = []
    for prefix, tails in ((0, (5,)), (20, (13, 3)), (3, (30, 1, 7))):
        head, *rest = (draw.integers(8, 200, size).astype(np.int32) for size in (prefix, *tails))
        spans = [Span(number, max(1, prefix // 2), prefix + len(tail)) for number, tail in enumerate(rest)]
        groups.append(TokenGroup(head, rest, (), spans=[*spans, spans[-1]]))
    return groups


def one_by_one(network: Any, groups: list[TokenGroup]) -> Tensor:
    total = torch.zeros(())
    for group in groups:
        for span in group.spans:
            ids = torch.from_numpy(np.concatenate([group.prefix, group.tails[span.response]]).astype(np.int64))
            losses = F.cross_entropy(network(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
            total = total + losses[span.first - 1 : span.last - 1].sum()
    return total


@pytest.mark.parametrize("packing", ["auto", pytest.param("padded", marks=pytest.mark.slow)])
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", fast_first(DECODERS))
def test_packed_losses_and_gradients_are_those_of_one_text_at_a_time(
    kind: str, tied: bool, packing: Any, tmp_path: Path
) -> None:
    folder = make_model(kind, tmp_path / kind, tie_word_embeddings=tied)
    model = load_language_model(str(folder), packing=packing).model.train()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found, wanted = model(collate(conversations())).total, one_by_one(plain, conversations())
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-6)
    found.backward()
    wanted.backward()
    expected = {name: each.grad for name, each in plain.named_parameters()}
    for name, parameter in model.network.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=2e-4, rtol=1e-4, msg=name)


def test_an_empty_batch_has_the_loss_0_and_a_gradient_of_0(tmp_path: Path) -> None:
    model = load_language_model(str(make_model("qwen2", tmp_path / "m"))).model.train()
    losses = model(collate([]))
    losses.total.backward()
    assert (losses.total.item(), len(losses.each), len(losses.correct)) == (0.0, 0, 0)
    assert all(each.grad is not None and not each.grad.any() for each in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["gemma2", "cohere", "granite", "gpt2", "opt", "phi", "gpt_oss", "mixtral", "bloom", "falcon", "qwen3_next"]
)
def test_scaled_and_capped_logits_are_those_of_transformers(kind: str) -> None:
    """The check of `language_model_way` compares with the library's logits."""
    way = language_model_way(AutoConfig.for_model(kind), "auto", what=kind)
    assert way.packed is (kind not in ("bloom", "falcon", "qwen3_next"))
    assert way.difference is not None and way.difference < 1e-4


@pytest.mark.parametrize("kind", ["bert", "modernbert", "t5", "bart"])
def test_a_type_that_predicts_no_next_token_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match=f"{kind} is none: it (attends in both directions|is an encoder-decoder)"):
        language_model_way(AutoConfig.for_model(kind), "auto", what="model")


@pytest.mark.slow
def test_a_folder_without_the_output_layer_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = make_model("qwen2", tmp_path / "m", tie_word_embeddings=False)
    reward_model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    reward_model.save_pretrained(folder)
    with pytest.raises(UserError, match="no output layer of a language model"):
        load_language_model(str(folder))
