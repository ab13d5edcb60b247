"""Memory: the formulas against what the library's models keep, and against the peak of whole training steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rm_gallery.modeling.adapters import add_lora
from rm_gallery.modeling.attention import dispatch
from rm_gallery.modeling.config import LoraConfig
from rm_gallery.modeling.parallel.master_weights import MasterWeights
from rm_gallery.objectives import OBJECTIVES
from rm_gallery.planning.memory import Layout, MemoryUse, Pack, activations, step_memory
from rm_gallery.planning.model_shape import ModelShape, load_shape
from rm_gallery.training.config import OptimConfig
from rm_gallery.training.optim import build_optimizer
from tests.planning.models import batch_and_pack, bytes_kept, model_and_shape
from tests.small import DECODERS, ENCODERS, fast_first

ONE = Layout("none", 1, 1, 2, False, False, False, False)
PACK = Pack(8192, 8192, 8192 * 1000)


@pytest.fixture(autouse=True)
def fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formulas are of the fused kernel, which a GPU takes; on a CPU plain products may be faster."""
    monkeypatch.setattr(dispatch, "_MAX_PLAIN_TOKENS", {})


@pytest.mark.parametrize("dtype", fast_first([torch.bfloat16, torch.float32]))
@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
@pytest.mark.slow
def test_activations_are_what_the_model_keeps(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, shape = model_and_shape(kind, tmp_path / "model")
    MasterWeights(model, dtype)
    batch, pack = batch_and_pack(shape, groups=6)
    expected = activations(shape, pack, dtype.itemsize, checkpointing=False)
    assert expected == pytest.approx(bytes_kept(model, batch), rel=0.03)


@pytest.mark.parametrize(("kind", "dtype"), [("qwen2", torch.bfloat16), ("bert", torch.float32)])
@pytest.mark.slow
def test_with_lora_a_layer_also_keeps_what_is_between_its_matrices(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    lora = LoraConfig(rank=16)
    model, full = model_and_shape(kind, tmp_path / "model", layers=4)
    base = sum(each.numel() for each in model.parameters())
    add_lora(model, lora, "base")
    MasterWeights(model, dtype)
    shape = load_shape(str(tmp_path / "model"), lora=lora)
    batch, pack = batch_and_pack(shape, groups=6)
    expected = activations(shape, pack, dtype.itemsize, checkpointing=False)
    assert expected == pytest.approx(bytes_kept(model, batch), rel=0.02)
    assert expected > activations(full, pack, dtype.itemsize, checkpointing=False)
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert shape.trained_parameters == trained
    assert shape.parameters - base == sum(each.numel() for name, each in model.named_parameters() if ".lora_" in name)
    use = step_memory(shape, replace(ONE, width=dtype.itemsize), pack, overhead=0)
    assert use.weights == 4 * trained + dtype.itemsize * (shape.parameters - trained)
    assert use.gradients <= 4 * trained and use.optimizer == 8 * trained


def test_a_quantized_base_model_takes_half_a_byte_for_each_weight() -> None:
    """bitsandbytes: a scale of one byte per 64 weights, and a float32 per 256 scales."""
    full, half = (
        load_shape("qwen2.5-7b", lora=LoraConfig(rank=16), quantization=each)  # type: ignore[arg-type]
        for each in (None, "nf4")
    )
    assert half.quantized_parameters == half.matrix_parameters
    assert half.quantized_bytes / half.quantized_parameters == pytest.approx(0.516, abs=1e-3)
    saved = step_memory(full, ONE, PACK, overhead=0).weights - step_memory(half, ONE, PACK, overhead=0).weights
    assert saved == pytest.approx(half.matrix_parameters * (2 - 0.516), rel=1e-3)


@pytest.mark.parametrize("kind", ["qwen2", "bert"])
def test_with_checkpointing_each_layer_keeps_its_input(kind: str, tmp_path: Path) -> None:
    model, shape = model_and_shape(kind, tmp_path / "model", layers=6)
    model.network.gradient_checkpointing_enable({"use_reentrant": False})
    batch, pack = batch_and_pack(shape, groups=6)
    expected = activations(shape, pack, 4, checkpointing=True)
    assert expected == pytest.approx(bytes_kept(model, batch), rel=0.15)  # masks and tables belong to nobody
    assert expected < activations(shape, pack, 4, checkpointing=False) / 5


def _peak_of_a_step(folder: Path, kind: str, layout: Layout, groups: int, vocab_size: int) -> tuple[float, MemoryUse]:
    """Bytes live at the peak of the second step, as torch's profiler counts them, and the estimate."""
    model, shape = model_and_shape(kind, folder / "model", vocab_size=vocab_size)
    batch, pack = batch_and_pack(shape, groups)
    if layout.checkpointing:
        model.network.gradient_checkpointing_enable({"use_reentrant": False})
    dtype = torch.bfloat16 if layout.width == 2 else torch.float32
    weights = MasterWeights(model, dtype, has_masters=layout.has_masters)
    optimizer = build_optimizer(weights.named_parameters(), OptimConfig(name=layout.optimizer))  # type: ignore[arg-type]
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for _ in range(1 if layout.one_micro_batch else 2):
            OBJECTIVES["bradley_terry"](model(batch), batch)[0].backward()
        optimizer.step()
        weights.copy_to_model()

    step()
    optimizer.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    trace = folder / "trace.json"
    recorded.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    use = step_memory(shape, layout, pack, overhead=0)
    return use.weights + use.compute_copy + use.optimizer + peak, use


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layout", "groups", "vocab_size", "moment"),
    [
        ("qwen2", ONE, 60, 264, "start of the backward pass"),
        ("qwen2", replace(ONE, width=4), 60, 264, "start of the backward pass"),
        ("qwen2", replace(ONE, checkpointing=True), 60, 264, "start of the backward pass"),
        ("qwen2", replace(ONE, one_micro_batch=True), 60, 264, "start of the backward pass"),
        ("qwen2", ONE, 1, 50000, "end of the backward pass"),
        ("qwen2", replace(ONE, one_micro_batch=True), 1, 50000, "end of the backward pass"),
        ("bert", ONE, 60, 264, "start of the backward pass"),
        ("gemma3_text", replace(ONE, width=4), 60, 264, "start of the backward pass"),
        ("qwen2", replace(ONE, has_masters=False, optimizer="muon"), 60, 264, "start of the backward pass"),
        ("qwen2", replace(ONE, optimizer="adamw_8bit"), 1, 50000, "optimizer step"),
        ("qwen2", replace(ONE, has_masters=False, optimizer="adafactor"), 1, 50000, "optimizer step"),
    ],
)
def test_the_peak_is_that_of_a_training_step(
    kind: str, layout: Layout, groups: int, vocab_size: int, moment: str, tmp_path: Path
) -> None:
    measured, use = _peak_of_a_step(tmp_path, kind, layout, groups, vocab_size)
    assert use.total == pytest.approx(measured, rel=0.04)
    assert use.moment == moment


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return load_shape("qwen2.5-7b")


def test_static_memory_is_16_bytes_a_parameter_and_a_copy(shape: ModelShape) -> None:
    use = step_memory(shape, ONE, PACK, overhead=5)
    assert use.weights == use.gradients == use.optimizer / 2 == 4 * shape.parameters
    assert use.compute_copy == 2 * (shape.parameters - shape.head_parameters)
    assert use.overhead == 5
    assert step_memory(shape, replace(ONE, width=4), PACK, overhead=0).compute_copy == 0


def test_the_average_of_the_weights_is_counted_by_itself(shape: ModelShape) -> None:
    for layout in (ONE, replace(ONE, strategy="fsdp2", num_processes=8, shards=8), replace(ONE, offload=True)):
        plain = step_memory(shape, layout, PACK, overhead=0)
        use = step_memory(shape, replace(layout, has_ema=True), PACK, overhead=0)
        added = 4 * shape.parameters / layout.shards
        assert (use.weights, plain.average) == (plain.weights, 0)
        assert use.average == (0 if layout.offload else added)
        assert use.total + use.host == pytest.approx(plain.total + plain.host + added)


def test_static_memory_of_each_optimizer(shape: ModelShape) -> None:
    count, small = shape.parameters, Pack(1, 1, 1)
    state = {"adamw": 8, "adamw_8bit": 2 + 8 / 256, "adafactor": 8 / 512}
    for name, per_parameter in state.items():
        use = step_memory(shape, replace(ONE, optimizer=name), small, overhead=0)
        assert use.optimizer == pytest.approx(per_parameter * count)
        assert use.weights == use.gradients == 4 * count
    muon = step_memory(shape, replace(ONE, optimizer="muon"), small, overhead=0)
    assert muon.optimizer == 8 * count - 4 * shape.matrix_parameters
    use = step_memory(shape, replace(ONE, has_masters=False, offload_optimizer=True), small, overhead=0)
    assert (use.weights, use.compute_copy) == (2 * count + 2 * shape.head_parameters, 0)
    assert (use.gradients, use.optimizer) == (4 * count, 8 * count)
    assert use.moment == "optimizer step"
    assert use.temporary == 4 * shape.largest_embedding + 11 * 2**22, "a float32 copy of one parameter at a time"


@pytest.mark.slow
def test_frozen_parameters_are_held_once_and_their_layers_keep_nothing() -> None:
    whole, half, head = (load_shape("qwen2.5-0.5b", freeze=each) for each in (None, 12, "backbone"))  # type: ignore[arg-type]
    assert (whole.trained_parameters, head.trained_parameters) == (whole.parameters, 896)
    kept = {each.trained_parameters: activations(each, PACK, 2, checkpointing=True) for each in (whole, half, head)}
    assert kept[half.trained_parameters] == pytest.approx(kept[whole.trained_parameters] / 2, rel=0.1)
    assert kept[896] < kept[whole.trained_parameters] / 30
    use = step_memory(head, ONE, PACK, overhead=0)
    assert use.weights == 2 * (whole.parameters - 896) + 4 * 896 and use.compute_copy == 0
    assert (use.optimizer, step_memory(head, replace(ONE, strategy="fsdp2", shards=2), PACK, overhead=0).weights) == (
        8 * 896, (whole.parameters - 896) + 2 * 896,
    )  # fmt: skip


def test_sharding_divides_what_is_static_and_gathers_layers(shape: ModelShape) -> None:
    whole = step_memory(shape, replace(ONE, strategy="ddp", num_processes=8), PACK, overhead=0)
    cut = step_memory(shape, replace(ONE, strategy="fsdp2", num_processes=8, shards=8), PACK, overhead=0)
    hybrid = step_memory(shape, replace(ONE, strategy="fsdp2", num_processes=8, shards=2), PACK, overhead=0)
    assert cut.weights == whole.weights / 8
    assert hybrid.optimizer == whole.optimizer / 2
    assert cut.compute_copy == 2 * (2 * shape.layer_parameters + shape.outer_parameters)
    assert cut.activations == whole.activations
    assert cut.total < hybrid.total < whole.total


def test_offloading_moves_memory_to_the_host(shape: ModelShape) -> None:
    layout = replace(ONE, strategy="fsdp2", num_processes=8, shards=8)
    kept = step_memory(shape, layout, PACK, overhead=0)
    moved = step_memory(shape, replace(layout, offload=True), PACK, overhead=0)
    assert moved.host == 16 * shape.parameters / 8 == kept.total - moved.total
    optimizer = step_memory(shape, replace(layout, offload_optimizer=True), PACK, overhead=0)
    assert optimizer.host == 8 * shape.parameters / 8 == kept.total - optimizer.total


def test_an_offloaded_optimizer_comes_back_for_its_step(shape: ModelShape) -> None:
    small = Pack(1, 1, 1)
    use = step_memory(shape, replace(ONE, offload_optimizer=True), small, overhead=0)
    assert use.moment == "optimizer step"
    assert use.total == 18 * shape.parameters - 2 * shape.head_parameters


def test_more_tokens_and_longer_groups_take_more(shape: ModelShape) -> None:
    totals = [
        step_memory(shape, ONE, Pack(tokens, tokens, tokens * length), overhead=0).total
        for tokens, length in ((1000, 100), (1000, 1000), (4000, 1000), (4000, 4000))
    ]
    assert totals == sorted(set(totals))
