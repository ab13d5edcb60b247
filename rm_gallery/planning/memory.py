"""Memory of one process in a training step, by kind: pure functions of a shape, a layout and a micro-batch.

Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4, count what a layer
keeps for its backward pass. The counts here follow this implementation instead of theirs: no dropout, GELU with one
matrix or gated MLPs with two, RMS norms that compute in float32, fused attention over buckets of groups, no output
layer over the vocabulary, rewards read at one token of a response. tests/planning holds them against what is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeAlias

from rm_gallery.planning.shapes import ModelShape

# w: bytes of a number in the compute type, 2 or 4; D hidden, I intermediate, Q query heads x head dim, K key heads x it

PerToken: TypeAlias = tuple[float, float, float]
"""Bytes that a layer keeps: for each token, for each place in attention's buckets, for each cell of their masks."""


@dataclass(frozen=True)
class Pack:
    """What memory depends on in a micro-batch."""

    tokens: float
    """Padded tokens for encoders."""
    rows: float
    """Places in attention's buckets: tokens and their padding."""
    cells: float
    """Sum over groups of the squared length of their bucket."""


@dataclass(frozen=True)
class Layout:
    """How a run spreads over processes and memories."""

    num_processes: int
    sharded: bool
    """fsdp, fsdp2: weights, gradients and optimizer state are split over `shards` processes."""
    shards: int
    width: int
    """Bytes of a number in the compute type."""
    checkpointing: bool
    offload_weights: bool
    offload_gradients: bool
    offload_optimizer: bool
    one_micro_batch: bool
    """A step has a single micro-batch on each process: gradients come into being while activations go."""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes at the peak of a step, on one process."""

    weights: float
    """float32, updated by the optimizer."""
    compute_copy: float
    """bfloat16 copy, or the whole layers that sharding gathers."""
    gradients: float
    """float32."""
    optimizer: float
    """AdamW's two moments, float32."""
    activations: float
    temporary: float
    """Largest: gradients of activations and of one matrix, one layer computed again, or the embedding's gradient."""
    overhead: float
    host: float
    """In host memory, when offloaded; not part of the total."""

    @property
    def total(self) -> float:
        return sum(getattr(self, each.name) for each in fields(self) if each.name != "host")


def layer_activations(shape: ModelShape, w: int) -> PerToken:
    """What one layer keeps from the forward to the backward pass, without checkpointing."""
    D, I, H = shape.hidden, shape.intermediate, shape.num_heads  # noqa: E741
    Q, K = H * shape.head_dim, shape.num_kv_heads * shape.head_dim
    head_norms = (4 + w) * (Q + K) + 4 * (H + shape.num_kv_heads)  # float32 inputs, results, one scale a head
    # Attention keeps query, repeated key and value, output, the softmax's logarithms, and a mask in the compute type.
    attention = (w * Q, 4 * w * Q + 4 * H, w)  # the output is gathered from the buckets: once more for each token
    gated_mlp = 4 * w * I  # gate before and after its activation, up, their product
    layer_norms = 2 * (2 * w * D + 2 * w)  # input, output, mean and scale, twice
    if shape.model_type == "gemma3_text":  # four norms, all in float32 to the end; two of them feed a matrix
        return (4 * (8 * D + 4) + 2 * w * D + 8 * (Q + K) + 4 * (H + shape.num_kv_heads) + gated_mlp + attention[0],
                *attention[1:])  # fmt: skip
    if not shape.padded:
        norms = 2 * ((4 + 2 * w) * D + 4)  # float32 input, normalised, times the weight
        return (norms + gated_mlp + (head_norms if shape.model_type == "qwen3" else 0) + attention[0], *attention[1:])
    if shape.model_type == "modernbert":  # query, key, the matrix of all three, output; the mask is the library's own
        return (layer_norms + 6 * w * D + 4 * H + gated_mlp, 0, 0)
    if shape.model_type == "deberta-v2":  # disentangled attention in plain matrices: scores to each relative position
        positions = 2 * w * H * 2 * shape.relative_span
        return (layer_norms + 5 * w * D + positions + 2 * w * I, 0, w * H + 1)
    return (layer_norms + 4 * w * D + 4 * H + 2 * w * I, 0, 0)


def activations(shape: ModelShape, pack: Pack, w: int, *, checkpointing: bool) -> float:
    """Bytes kept for the backward pass of a micro-batch when the forward pass ends.

    With checkpointing each layer keeps its input alone (Chen et al. 2016, "Training Deep Nets with Sublinear Memory
    Cost", section 3). What comes before and after the layers is kept either way: rotary tables or embeddings, the last
    norm, ids, and a mask for each kind of layer.
    """
    kept = shape.num_layers * (w * shape.hidden * pack.tokens if checkpointing else layer_bytes(shape, pack, w))
    if shape.padded:
        return kept + pack.tokens * (2 * w * shape.hidden + 24) + w * pack.cells
    outer = (4 + w) * shape.hidden + 4 + 2 * w * shape.head_dim + 64
    return kept + pack.tokens * outer + len(set(shape.windows)) * pack.cells


def layer_bytes(shape: ModelShape, pack: Pack, w: int) -> float:
    """Bytes that one layer keeps for a micro-batch."""
    per_token, per_row, per_cell = layer_activations(shape, w)
    bytes_kept = pack.tokens * per_token + pack.rows * per_row + pack.cells * per_cell
    if shape.relative_span:  # keys and queries of all relative positions, for each text
        bytes_kept += pack.tokens**2 / pack.cells * 4 * w * shape.relative_span * shape.hidden
    return bytes_kept


def step_memory(shape: ModelShape, layout: Layout, pack: Pack, *, overhead: float) -> MemoryUse:
    """The peak of a training step.

    Static parts are those of Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter
    Models", section 3.1 and stage 3 of section 5, with float32 gradients as `MasterWeights` sums them. The peak is
    where the backward pass begins, with all activations, or where it ends, with the embedding's gradient.
    """
    w, shards = layout.width, layout.shards if layout.sharded else 1
    weights = 4 * shape.parameters / shards
    if layout.sharded:  # the layer that computes, the next one on its way, and what lies outside the layers
        copy = w * (2 * shape.layer_parameters + shape.outer_parameters)
    else:
        copy = w * (shape.parameters - shape.head_parameters) if w < 4 else 0
    gradients, optimizer = weights, 2 * weights
    host = layout.offload_weights * weights + layout.offload_gradients * gradients
    host += layout.offload_optimizer * optimizer
    kept = activations(shape, pack, w, checkpointing=layout.checkpointing)
    recomputed = layer_bytes(shape, pack, w) if layout.checkpointing else 0
    begin = max(_last_norm(shape, pack), recomputed + _mlp_gradients(shape, pack, w))
    # A gradient is made in the compute type and summed in float32; sharding does both for a layer at once.
    summed = w + (4 if w < 4 or layout.sharded else 0)
    begin += summed * (shape.layer_parameters if layout.sharded else shape.largest_matrix)
    if not layout.sharded and layout.one_micro_batch:
        summed = w if w < 4 else 0  # the first gradient is the sum itself
    end = summed * (shape.outer_parameters if layout.sharded else shape.largest_embedding)
    device_gradients = 0 if layout.offload_gradients else gradients
    early_gradients = 0 if layout.one_micro_batch else device_gradients
    at_end = device_gradients + end > early_gradients + kept + begin
    return MemoryUse(
        weights=0 if layout.offload_weights else weights,
        compute_copy=copy,
        gradients=device_gradients if at_end else early_gradients,
        optimizer=0 if layout.offload_optimizer else optimizer,
        activations=0 if at_end else kept,
        temporary=end if at_end else begin,
        overhead=overhead,
        host=host,
    )


def _last_norm(shape: ModelShape, pack: Pack) -> float:
    """Gradients of a decoder's last norm, which computes in float32: about 18 bytes a number live at once."""
    return 0 if shape.padded else 18 * shape.hidden * pack.tokens


def _mlp_gradients(shape: ModelShape, pack: Pack, w: int) -> float:
    """Gradients live at once in an MLP, less what it kept and gave up by then: two intermediates if gated, else one."""
    is_gated = not shape.padded or shape.model_type == "modernbert"
    return w * pack.tokens * ((2 if is_gated else 1) * shape.intermediate - shape.hidden)
