"""The systems that `throughput` compares, and the shapes and chats that it gives them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from rm_gallery.data.batching.bin_packing import Packer, attention_length
from rm_gallery.data.batching.packed_batch import PackedBatch, collate
from rm_gallery.data.token_cache.arrays import GroupSizes
from rm_gallery.data.tokenization.token_group import TokenGroup
from rm_gallery.distributed.process_group import World
from rm_gallery.modeling.attention import dispatch
from rm_gallery.modeling.config import FsdpConfig, ModelConfig
from rm_gallery.modeling.packing import choose_way
from rm_gallery.modeling.parallel.apply import apply
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.objectives import bradley_terry
from rm_gallery.planning.memory import Layout, Pack, step_memory
from rm_gallery.planning.model_shape import ModelShape
from rm_gallery.schema import Comparison
from rm_gallery.training.config import OptimConfig
from rm_gallery.training.optim import build_optimizer

# layers, hidden, intermediate, heads, key-value heads, vocabulary
SHAPES = {
    "tiny": (2, 64, 128, 4, 2, 1000),
    "0.5b": (24, 896, 4864, 14, 2, 151936),
    "1.5b": (28, 1536, 8960, 12, 2, 151936),
    "7b": (28, 3584, 18944, 28, 4, 152064),
}
BYTES_PER_PARAMETER = 18  # float32 weight, gradient and two moments, and the bfloat16 copy
STEP_PAIRS, PADDED_PAIRS, BUDGET, LONGEST = 64, 8, 16384, 4096


def make_groups(count: int, vocabulary: int, scale: float, num_responses: int = 2) -> list[TokenGroup]:
    """Groups of random tokens. scale: of the lengths, below 1 for machines without a GPU."""
    draw = np.random.default_rng(0)
    groups = []
    for _ in range(count):
        prompt, *tails = (
            max(1, int(scale * min(LONGEST / 3, draw.lognormal(math.log(middle), width))))
            for middle, width in ((200, 0.9), *[(300, 0.75)] * num_responses)
        )
        tokens = [draw.integers(10, vocabulary, length).astype(np.int32) for length in (prompt, *tails)]
        groups.append(TokenGroup(tokens[0], tokens[1:], [Comparison(0, 1)]))
    return groups


def sizes_of(groups: list[TokenGroup]) -> GroupSizes:
    lengths = np.array([[len(group.prefix), *map(len, group.tails)] for group in groups], np.int64)
    ones = np.ones(len(groups), np.int64)
    num_responses = (lengths.shape[1] - 1) * ones
    return GroupSizes(lengths.sum(1), lengths[:, 0] + lengths[:, 1:].max(1), num_responses, ones)


def make_packs(groups: list[TokenGroup], budget: int, hidden_size: int) -> list[PackedBatch]:
    packs = Packer(budget, attention_length=attention_length(hidden_size)).pack(sizes_of(groups))[0]
    return [collate([groups[index] for index in pack]) for pack in packs]


def shape_config(shape: str, layers: int) -> Any:
    from transformers import Qwen2Config

    _, hidden, intermediate, heads, kv_heads, vocabulary = SHAPES[shape]
    return Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=32768, pad_token_id=0,
        num_labels=1, architectures=["Qwen2ForSequenceClassification"],
    )  # fmt: skip


def num_layers_that_fit(shape: str, device: torch.device) -> int:
    layers, hidden, intermediate, heads, kv_heads, vocabulary = SHAPES[shape]
    if device.type == "cpu":
        return layers
    each = hidden * (2 * hidden + 2 * hidden * kv_heads // heads + 3 * intermediate)
    room = 0.7 * torch.cuda.get_device_properties(device).total_memory / BYTES_PER_PARAMETER - hidden * vocabulary
    return max(1, min(layers, int(room // each)))


def make_network(config: Any, device: torch.device, **extra: Any) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    with device:
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32, **extra)


def ours(config: Any, packs: list[PackedBatch], device: torch.device, **settings: Any) -> Callable[[], None]:
    """A step of our trainer's parts: forward, loss, backward of each pack; clip, AdamW, copy to the model."""
    dispatch.install()
    network = make_network(config, device, attn_implementation=dispatch.NAME)
    world = World(0, 1, device)
    config_of_model = ModelConfig(fsdp_config=FsdpConfig(model_dtype="bf16"), **settings)
    model = RewardModel(network, choose_way(network.config, "auto", what="model"))
    weights = apply(model, config_of_model, world, strategy="none")
    optimizer = build_optimizer(weights.named_parameters(), OptimConfig(lr=1e-6))
    count = sum(len(pack.better) for pack in packs)

    def step() -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for number, pack in enumerate(packs):
            batch = pack.to(device)
            loss, _ = bradley_terry(model(batch), batch)
            weights.backward(loss / count, is_last=number == len(packs) - 1)
            total += loss.detach()
        weights.gather_gradients(total / count, 1.0)
        optimizer.step()
        weights.copy_to_model()

    return step


def padded(config: Any, groups: list[TokenGroup], device: torch.device, *, checkpointing: bool) -> Callable[[], None]:
    """A step over micro-batches that are padded to their longest text, prompts twice."""
    network = make_network(config, device, attn_implementation="sdpa")
    if checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)
    batches = []
    for start in range(0, len(groups), PADDED_PAIRS):
        some = groups[start : start + PADDED_PAIRS]
        batches.append(
            _padded_ids([np.concatenate([group.prefix, group.tails[side]]) for side in (0, 1) for group in some])
        )

    def step() -> None:
        network.train()
        optimizer.zero_grad(set_to_none=True)
        for ids, mask in batches:
            with torch.autocast(device.type, torch.bfloat16):
                rewards = network(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, 0].float()
            chosen, rejected = rewards.chunk(2)
            (-F.logsigmoid(chosen - rejected).sum() / len(groups)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return step


def estimated_peak(shape: ModelShape, packs: list[PackedBatch], *, checkpointing: bool) -> float:
    """Bytes that `rm-gallery estimate` expects of a step over these micro-batches, without the CUDA context."""
    layout = Layout("none", 1, 1, 2, checkpointing, False, False, len(packs) == 1)
    fill = 0.9  # of the places in attention's buckets, as the estimate assumes
    each = [
        Pack(pack.num_tokens, pack.num_tokens / fill, sum(length**2 for length in pack.group_lengths) / fill**2)
        for pack in packs
    ]
    return max(step_memory(shape, layout, pack, overhead=0).total for pack in each)


def packed_scoring(
    config: Any, groups: list[TokenGroup], packs: list[PackedBatch], device: torch.device
) -> Callable[[], torch.Tensor]:
    """Rewards [prompts x 16] of packed groups, in the order of the groups' largest tokens."""
    dispatch.install()
    network = make_network(config, device, attn_implementation=dispatch.NAME)
    model = RewardModel(network, choose_way(config, "auto", what="model"))
    head = model.head.weight.detach().clone()
    model.to(torch.bfloat16)
    model.head.weight.data = head
    model.eval()

    @torch.inference_mode()
    def score() -> torch.Tensor:
        found = [model(pack.to(device)).float() for pack in packs]
        return torch.cat(found).cpu().sort().values

    return score


def padded_scoring(
    config: Any, groups: list[TokenGroup], packs: list[PackedBatch], device: torch.device
) -> Callable[[], torch.Tensor]:
    """The same by the library's model in bfloat16, a prompt's 16 texts padded to the longest."""
    network = make_network(config, device, attn_implementation="sdpa").to(torch.bfloat16).eval()
    batches = [_padded_ids([np.concatenate([group.prefix, tail]) for tail in group.tails]) for group in groups]

    @torch.inference_mode()
    def score() -> torch.Tensor:
        found = [network(input_ids=ids.to(device), attention_mask=mask.to(device)).logits for ids, mask in batches]
        return torch.cat(found)[:, 0].float().cpu().sort().values

    return score


def _padded_ids(texts: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = np.zeros((len(texts), max(map(len, texts))), np.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    return torch.from_numpy(ids), torch.from_numpy((ids > 0).astype(np.int64))


def seconds_of_trl(
    config: Any, groups: list[TokenGroup], device: torch.device, *, checkpointing: bool, repeats: int
) -> list[float]:
    """Seconds of each step of TRL's trainer but the first two; raises ImportError where it is not installed.

    It takes texts, so each token becomes a word of a vocabulary that is as large as the model's.
    """
    import tempfile

    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    vocabulary = {f"t{token}": token for token in range(config.vocab_size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="t1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="t0", eos_token="t2", unk_token="t1")
    texts = [[" ".join(f"t{token}" for token in (*group.prefix, *tail)) for tail in group.tails] for group in groups]
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in texts] * (repeats + 2)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait(device)
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        RewardTrainer(
            model=make_network(config, device, attn_implementation="sdpa"),
            args=RewardConfig(
                output_dir=folder, per_device_train_batch_size=PADDED_PAIRS, num_train_epochs=1, report_to=[],
                gradient_accumulation_steps=STEP_PAIRS // PADDED_PAIRS, max_length=LONGEST + 1, learning_rate=1e-6,
                save_strategy="no", use_cpu=device.type == "cpu", bf16=True, gradient_checkpointing=checkpointing,
                disable_tqdm=True, logging_steps=10**6,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        ).train()  # fmt: skip
    return [b - a for a, b in pairwise(ends[1:])]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
