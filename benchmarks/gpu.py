"""Training speed on one GPU: ours by kernel, against padding as other trainers do, for Qwen2.5 shapes.

    python -m benchmarks.gpu [--shapes 0.5b 1.5b 7b] [--seconds 420] [--output FILE.json]
    python -m benchmarks.gpu --device cpu --shapes tiny        # the same code without a GPU

Packages: torch >= 2.11, transformers >= 5.17, numpy, annotated-types, safetensors; triton for FlexAttention, flash-attn
or a torch with variable-length attention for `varlen`, liger-kernel for `liger`, trl and datasets for `trl`: what is
missing is left out, and a line says so. Needs no network and no files: weights and texts are random, from a seed.

Chats have log-normal lengths: prompts around 200 tokens, responses around 300 (95% below 900 and 1,000), at most 4,096
in all. A step is 64 pairs; ours packs 16,384 tokens a micro-batch. `padded` is the library's model with its fused
attention in bf16 autocast over micro-batches of 8 pairs that are padded to their longest, which is what TRL's trainer
computes; `trl` is that trainer. All have gradient checkpointing where the shape needs it. A shape that does not fit
whole (float32 weights, gradients and AdamW's moments, 18 bytes a parameter) has as many of its layers as do; the table
says how many.
MFU is operations on unique tokens (forward and backward, no checkpointing, the last layer only where needed) over the
rate of 8,192-wide bfloat16 products measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.matrix_rate import operations
from rm_gallery.data.batch import PackedBatch, collate
from rm_gallery.data.micro_batches import Packer, attention_length
from rm_gallery.data.token_data import GroupSizes
from rm_gallery.data.token_group import TokenGroup
from rm_gallery.distributed import World
from rm_gallery.modeling.parallel import FsdpConfig, ModelConfig, apply
from rm_gallery.modeling.reward_model import RewardModel, network_class_arguments
from rm_gallery.objectives import bradley_terry
from rm_gallery.schema import Comparison

# layers, hidden, intermediate, heads, key-value heads, vocabulary
SHAPES = {
    "tiny": (2, 64, 128, 4, 2, 1000),
    "0.5b": (24, 896, 4864, 14, 2, 151936),
    "1.5b": (28, 1536, 8960, 12, 2, 151936),
    "7b": (28, 3584, 18944, 28, 4, 152064),
}
BYTES_PER_PARAMETER = 18  # float32 weight, gradient and two moments, and the bfloat16 copy
STEP_PAIRS, PADDED_PAIRS, BUDGET, LONGEST = 64, 8, 16384, 4096


@dataclass
class Result:
    """One system on one shape."""

    shape: str
    system: str
    pairs_per_second: list[float]
    tokens_per_second: float
    mfu: float | None
    peak_gib: float
    problem: str = ""


def make_groups(count: int, vocabulary: int, scale: float) -> list[TokenGroup]:
    """Pairs of random tokens. scale: of the lengths, below 1 for machines without a GPU."""
    draw = np.random.default_rng(0)
    groups = []
    for _ in range(count):
        prompt, *tails = (
            max(1, int(scale * min(LONGEST / 3, draw.lognormal(math.log(middle), width))))
            for middle, width in ((200, 0.9), (300, 0.75), (300, 0.75))
        )
        tokens = [draw.integers(10, vocabulary, length).astype(np.int32) for length in (prompt, *tails)]
        groups.append(TokenGroup(tokens[0], tokens[1:], [Comparison(0, 1)]))
    return groups


def sizes_of(groups: list[TokenGroup]) -> GroupSizes:
    lengths = np.array([[len(group.prefix), *map(len, group.tails)] for group in groups], np.int64)
    ones = np.ones(len(groups), np.int64)
    return GroupSizes(lengths.sum(1), lengths[:, 0] + lengths[:, 1:].max(1), 2 * ones, ones)


def make_packs(groups: list[TokenGroup], budget: int, hidden_size: int) -> list[PackedBatch]:
    packs = Packer(budget, attention_length=attention_length(hidden_size)).pack(sizes_of(groups))[0]
    return [collate([groups[index] for index in pack]) for pack in packs]


def shape_config(shape: str, layers: int, folder: Path) -> Any:
    from transformers import Qwen2Config

    _, hidden, intermediate, heads, kv_heads, vocabulary = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=32768, pad_token_id=0,
        num_labels=1, architectures=["Qwen2ForSequenceClassification"],
    )  # fmt: skip
    config.save_pretrained(folder)
    return config


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


def ours(
    config: Any, folder: Path, packs: list[PackedBatch], device: torch.device, **settings: Any
) -> Callable[[], None]:
    """A step of our trainer's parts: forward, loss, backward of each pack; clip, AdamW, publish."""
    from rm_gallery.training.optim import OptimConfig, build_optimizer

    (folder / "model.safetensors").touch()  # the check of a model folder asks for weights, which are random here
    _, extra = network_class_arguments(str(folder), key="model", trust_remote_code=False, dropout=0.0)
    network = make_network(config, device, **extra)
    world = World(0, 1, device)
    config_of_model = ModelConfig(fsdp_config=FsdpConfig(model_dtype="bf16"), **settings)
    model, weights = apply(RewardModel(network), config_of_model, world, strategy="none")
    optimizer = build_optimizer(weights.named_parameters(), OptimConfig(lr=1e-6), is_matrix=weights.is_matrix)
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
        weights.publish()

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
        texts = [np.concatenate([group.prefix, group.tails[side]]) for side in (0, 1) for group in some]
        ids = np.zeros((len(texts), max(map(len, texts))), np.int64)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = text
        batches.append((torch.from_numpy(ids), torch.from_numpy((ids > 0).astype(np.int64))))

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


def matrix_rate(device: torch.device, seconds: float = 1.0) -> float:
    """Operations a second of large bfloat16 products."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    wait(device)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(10):
            a @ b
        wait(device)
        count += 10
    return 2 * size**3 * count / (time.perf_counter() - start)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_step(step: Callable[[], None], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    step()
    wait(device)
    return time.perf_counter() - start


def profile(step: Callable[[], None], device: torch.device) -> str:
    """The kernels that take most of a step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch_profile(activities=kinds) as found:
        step()
        wait(device)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return str(found.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=60))


def systems(options: argparse.Namespace, checkpointing: bool) -> dict[str, dict[str, Any] | None]:
    """Settings of ours by name; None for the others."""
    more = {"enable_gradient_checkpointing": True} if checkpointing else {}
    found: dict[str, dict[str, Any] | None] = {
        f"ours, {name}": {"attention": name, **more} for name in ("varlen", "flex", "sdpa")
    }
    if options.device == "cpu":
        found = {"ours, auto": more}
    else:
        found["ours, auto, liger"] = {"use_liger": True, **more}
        found["ours, auto, compile"] = {"compile": True, **more}
    return {**found, "padded": None, "trl": None}


def measure_shape(shape: str, options: argparse.Namespace, rate: float, deadline: float) -> list[Result]:
    import tempfile

    device = torch.device(options.device)
    layers = num_layers_that_fit(shape, device)
    scale = 1.0 if device.type == "cuda" else 0.1
    groups = make_groups(STEP_PAIRS, SHAPES[shape][-1], scale)
    checkpointing = shape == "7b"
    name_of_shape = shape if layers == SHAPES[shape][0] else f"{shape}, {layers} layers"
    results = []
    step: Any = None
    for name, settings in systems(options, checkpointing).items():
        if time.monotonic() > deadline:
            results.append(Result(name_of_shape, name, [], 0.0, None, 0.0, "no time left (--seconds)"))
            continue
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            with tempfile.TemporaryDirectory() as folder:
                config = shape_config(shape, layers, Path(folder))
                packs = make_packs(groups, int(BUDGET * scale), config.hidden_size)
                if name == "trl":
                    options_of_trl = {"checkpointing": checkpointing, "repeats": options.repeats}
                    seconds = seconds_of_trl(config, groups, device, **options_of_trl)
                elif settings is None:
                    step = padded(config, groups, device, checkpointing=checkpointing)
                else:
                    step = ours(config, Path(folder), packs, device, **settings)
            if name != "trl":
                seconds = [time_step(step, device) for _ in range(options.repeats + 2)][2:]
        except Exception as error:  # a kernel that is not there, or too little memory: the others are still measured
            text = " ".join(str(error).split())[:90] or type(error).__name__
            results.append(Result(name_of_shape, name, [], 0.0, None, 0.0, text))
            step = None
            gc.collect()
            continue
        work = sum(operations(config, pack.group_lengths, pack.tail_lengths) for pack in packs)
        tokens = sum(pack.num_tokens for pack in packs)
        middle = statistics.median(seconds)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        rates = [len(groups) / each for each in seconds]
        results.append(Result(name_of_shape, name, rates, tokens / middle, work / middle / rate, peak))
        print(f"{name_of_shape}: {name}: {middle:.3f} s a step", flush=True)
        if options.profile == shape and settings is not None and name == next(iter(systems(options, checkpointing))):
            print(profile(step, device), flush=True)
        step = None
        gc.collect()
    return results


def show(results: list[Result], rate: float, options: argparse.Namespace) -> None:
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    tflops = f"{rate / 1e12:.4g} TFLOP/s in bfloat16 products"
    print(f"\n{device}, torch {torch.__version__}, {tflops}; {STEP_PAIRS} pairs a step")
    columns = ("tokens/s", 10), ("MFU", 7), ("peak GiB", 10), ("/ padded", 10)
    head = "".join(f"{name:>{width}}" for name, width in columns)
    print(f"{'shape':18}{'system':22}{'pairs/s: median (range)':30}{head}")
    for each in results:
        if each.problem:
            print(f"{each.shape:18}{each.system:22}{each.problem}")
            continue
        base = [
            other for other in results if other.shape == each.shape and other.system == "padded" and not other.problem
        ]
        middle = statistics.median(each.pairs_per_second)
        ratio = f"{middle / statistics.median(base[0].pairs_per_second):.2f}" if base else ""
        spread = f"{middle:.2f} ({min(each.pairs_per_second):.2f} to {max(each.pairs_per_second):.2f})"
        print(
            f"{each.shape:18}{each.system:22}{spread:30}{each.tokens_per_second:10,.0f}{each.mfu or 0:7.1%}"
            f"{each.peak_gib:10.2f}{ratio:>10}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shapes", nargs="+", default=["0.5b", "1.5b", "7b"], choices=SHAPES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=420.0, help="no system is begun after this")
    parser.add_argument("--profile", default="1.5b", help="shape of which the first system is profiled")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu --shapes tiny runs the same code")
    deadline = time.monotonic() + options.seconds
    rate = matrix_rate(torch.device(options.device))
    results: list[Result] = []
    for shape in options.shapes:
        results += measure_shape(shape, options, rate, deadline)
    show(results, rate, options)
    if options.output:
        options.output.write_text(
            json.dumps({"rate": rate, "results": [vars(each) for each in results]}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
