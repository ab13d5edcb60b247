"""The heart of the suite: packed equals one by one, shared prompts equal separate texts, export equals training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.tokenization.token_group import TokenGroup
from rm_gallery.modeling.export import InputRecord, rescore, set_pad_token
from rm_gallery.modeling.reward_model import RewardModel, load_reward_model
from rm_gallery.objectives import OBJECTIVES
from tests.small import DECODERS, ENCODERS, export_model, make_model, make_tokenizer, random_groups, whole_texts

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=DECODERS + ENCODERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(folder: Path) -> RewardModel:
    torch.manual_seed(1)
    return load_reward_model(str(folder)).model.eval()


def plain_rewards(model: RewardModel, texts: list[list[int]]) -> torch.Tensor:
    """Each text alone through the library's whole model, with its ordinary attention."""
    network = model.network
    implementation = network.config._attn_implementation
    network.set_attn_implementation("eager")
    try:
        rows = [network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, 0] if not model.padded
                else network(input_ids=torch.tensor([ids])).logits[0, 0] for ids in texts]  # fmt: skip
    finally:
        network.set_attn_implementation(implementation)
    return torch.stack(rows)


def test_packed_rewards_equal_one_by_one(model: RewardModel) -> None:
    groups = random_groups(0)
    with torch.no_grad():
        torch.testing.assert_close(
            model(collate(groups)), plain_rewards(model, whole_texts(groups)), atol=TOLERANCE, rtol=0
        )


def test_shared_prefix_gives_the_rewards_and_gradients_of_separate_texts(model: RewardModel) -> None:
    groups = random_groups(1)
    batch = collate(groups)
    shared = gradients(model, lambda: OBJECTIVES["bradley_terry"](model(batch), batch)[0])
    alone = gradients(model, lambda: OBJECTIVES["bradley_terry"](plain_rewards(model, whole_texts(groups)), batch)[0])
    assert shared.keys() == alone.keys()
    for name, gradient in shared.items():
        scale = max(1.0, float(alone[name].abs().max()))
        torch.testing.assert_close(
            gradient, alone[name], atol=TOLERANCE * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def gradients(model: RewardModel, loss) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    model.zero_grad(set_to_none=True)
    loss().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_rewards_do_not_depend_on_neighbours_or_order(model: RewardModel) -> None:
    groups = random_groups(2)
    with torch.no_grad():
        together = model(collate(groups)).split([len(group.tails) for group in groups])
        reverse = model(collate(groups[::-1])).split([len(group.tails) for group in groups[::-1]])[::-1]
        for group, first, second in zip(groups, together, reverse, strict=True):
            torch.testing.assert_close(first, model(collate([group])), atol=TOLERANCE, rtol=0)
            torch.testing.assert_close(first, second, atol=TOLERANCE, rtol=0)


def test_a_response_cannot_see_its_sibling(model: RewardModel) -> None:
    group = random_groups(3)[5]
    changed = TokenGroup(group.prefix, [group.tails[0], group.tails[1][::-1].copy(), *group.tails[2:]], ())
    with torch.no_grad():
        before, after = model(collate([group])), model(collate([changed]))
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]], atol=TOLERANCE, rtol=0)
    assert before[1] != after[1]


def test_an_empty_batch_gives_no_reward_but_a_graph(model: RewardModel) -> None:
    batch = collate([])
    loss, _ = OBJECTIVES["bradley_terry"](model(batch), batch)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    model.zero_grad(set_to_none=True)


def test_gradient_checkpointing_changes_no_gradient(folder: Path) -> None:
    batch = collate(random_groups(4))
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = load_reward_model(str(folder)).model.train()
        if checkpointing:
            model.network.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            assert model.network.is_gradient_checkpointing
        found.append(gradients(model, lambda model=model: OBJECTIVES["bradley_terry"](model(batch), batch)[0]))
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-5)


def test_exported_folder_gives_the_trained_rewards_everywhere(folder: Path, model: RewardModel, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    tokenizer = make_tokenizer(encoder=model.padded)
    set_pad_token(model, tokenizer)
    export_model(tmp_path / "out", model, tokenizer, InputRecord("text"))
    texts = [
        "Why is the sky blue?",
        "Because.",
        "Light of short waves is scattered more by air than light of long waves.",
    ]
    ids = tokenizer(texts)["input_ids"]
    groups = [TokenGroup(torch.tensor([]).int().numpy(), [torch.tensor(row).int().numpy()], ()) for row in ids]
    with torch.no_grad():
        trained = model(collate(groups)).tolist()

    assert rescore(tmp_path / "out", ids) == pytest.approx(trained, abs=TOLERANCE)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for side in ("right",) if model.padded else ("right", "left"):
        batch = loaded(texts, padding=True, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
        assert logits.tolist() == pytest.approx(trained, abs=TOLERANCE), side
    classify = pipeline("text-classification", model=str(tmp_path / "out"), dtype=torch.float32, device="cpu")
    found = classify(texts, function_to_apply="none", batch_size=3, padding=True)
    assert [answer["score"] for answer in found] == pytest.approx(trained, abs=TOLERANCE)
    assert [answer["label"] for answer in found] == ["reward"] * 3
