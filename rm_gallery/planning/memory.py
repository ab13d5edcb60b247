"""Peak memory of one process in a training step, by kind: pure functions of a shape, a layout and a micro-batch.

Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4, count the
activations that a layer saves for its backward pass. The counts here are of this implementation: no dropout, GELU with
one matrix or gated MLPs with two, RMS norms, fused attention over buckets of groups, no output layer over the
vocabulary, rewards read at one token of a response. tests/planning compares them with the tensors that autograd saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from rm_gallery.modeling.architectures import architecture
from rm_gallery.modeling.parallel.strategy import optimizer_state_bytes
from rm_gallery.planning.model_shape import ModelShape

# w bytes per number in the compute dtype (2 or 4), D hidden, I intermediate, Q query heads x head dim, K key heads x it

_BUCKET = 2**25  # numbers in a gradient bucket of DDP

PerToken: TypeAlias = tuple[float, float, float]
"""Bytes that a layer saves: per token, per place in attention's buckets, per cell of their masks."""


@dataclass(frozen=True)
class Pack:
    """The sizes of a micro-batch that memory depends on."""

    tokens: float
    """Padded tokens for encoders."""
    rows: float
    """Places in attention's buckets: tokens and padding."""
    cells: float
    """Sum over groups of the squared length of their bucket."""


@dataclass(frozen=True)
class Layout:
    """How a run is sharded, and where its state lives."""

    strategy: str
    """The strategy that runs: none (one process), ddp or fsdp2."""
    num_processes: int
    shards: int
    """Ranks that weights, gradients and optimizer state are sharded across; 1 if they are replicated."""
    width: int
    """Bytes per number in the compute dtype."""
    checkpointing: bool
    offload: bool
    """Weights, gradients and optimizer state are offloaded to host memory."""
    offload_optimizer: bool
    """Only the optimizer state is offloaded; it is moved to the GPU for the optimizer step."""
    one_micro_batch: bool
    """A step has a single micro-batch on each process: gradients are allocated as activations are freed."""

    optimizer: str = "adamw"
    """`optim.name`."""
    has_masters: bool = True
    """Trained weights are float32 beside a copy in the compute dtype; else only that, with stochastic rounding."""
    has_ema: bool = False
    """`trainer.ema_decay`: a float32 average of the trained weights beside them."""

    @property
    def sharded(self) -> bool:
        return self.strategy in ("fsdp", "fsdp2")


@dataclass(frozen=True)
class MemoryUse:
    """Bytes at one moment of a step, on one process."""

    moment: str
    weights: float
    """Master weights, float32; without master weights those in the compute dtype."""
    compute_copy: float
    """bfloat16 copy of the weights, or the layers that FSDP has all-gathered."""
    gradients: float
    """float32."""
    optimizer: float
    """State of the optimizer: two moments in float32 with AdamW."""
    activations: float
    temporary: float
    """The largest of: gradients of activations and of one matrix, a recomputed layer, the embeddings' gradient."""
    overhead: float
    host: float
    """Offloaded to host memory; not part of the total."""
    average: float = 0.0
    """Float32 average of the trained weights (EMA)."""

    @property
    def total(self) -> float:
        parts = (self.weights, self.compute_copy, self.gradients, self.optimizer, self.activations, self.temporary)
        return sum(parts) + self.average + self.overhead


def layer_activations(shape: ModelShape, w: int) -> PerToken:
    """What one layer saves for the backward pass, without activation checkpointing."""
    D, I, H = shape.hidden, shape.intermediate, shape.num_heads  # noqa: E741
    Q, K = H * shape.head_dim, shape.num_kv_heads * shape.head_dim
    head_norms = w * (Q + K) + 4 * (H + shape.num_kv_heads)  # normalized, one scale per head
    # Attention saves query, repeated key and value, output, log-sum-exp, and a mask in the compute dtype.
    attention = (w * Q, 4 * w * Q + 4 * H, w)  # the output is gathered from the buckets: one more copy per token
    gated_mlp = 4 * w * I  # gate before and after its activation, up, their product
    layer_norms = 2 * (2 * w * D + 2 * w)  # input, output, mean and scale, twice
    kind = architecture(shape.model_type)
    if kind.float32_norms:  # four norms in float32; two of them feed a matrix
        return (4 * (8 * D + 4) + 2 * w * D + 8 * (Q + K) + 4 * (H + shape.num_kv_heads) + gated_mlp + attention[0],
                *attention[1:])  # fmt: skip
    if not shape.padded:
        norms = 2 * _norm(shape, w)
        gated_mlp += 2 * w * shape.experts_per_token * D  # each expert's copy of its input, and its output
        return (norms + gated_mlp + (head_norms if kind.head_norms else 0) + attention[0], *attention[1:])
    if shape.model_type == "modernbert":  # query, key, the matrix of all three, output; the mask is the library's own
        return (layer_norms + 6 * w * D + 4 * H + gated_mlp, 0, 0)
    if kind.relative_attention:  # disentangled attention in plain matrices: scores to each relative position
        positions = 2 * w * H * 2 * shape.relative_span
        return (layer_norms + 5 * w * D + positions + 2 * w * I, 0, w * H + 1)
    return (layer_norms + 4 * w * D + 4 * H + 2 * w * I, 0, 0)


def _norm(shape: ModelShape, w: int) -> float:
    """Bytes per token that a decoder's norm before a matrix saves: normalized, times the weight, one scale.

    Gemma's saves input and output in float32, and the matrix saves its input in the compute dtype.
    """
    return (8 + w if architecture(shape.model_type).float32_norms else 2 * w) * shape.hidden + 4


def last_layer_bytes(shape: ModelShape, pack: Pack, w: int) -> float:
    """Bytes that a decoder's last layer saves: keys and values of all tokens, everything else at reward tokens only."""
    width, heads = shape.num_kv_heads * shape.head_dim, shape.num_kv_heads
    adapters = w * shape.adapter_rank * min(2, shape.adapted_per_layer)
    key_norm = {"qwen3": w * width + 4 * heads, "gemma3_text": 8 * width + 4 * heads}.get(shape.model_type, 0)
    return pack.tokens * (_norm(shape, w) + key_norm + adapters) + pack.rows * 2 * w * shape.num_heads * shape.head_dim


def activations(shape: ModelShape, pack: Pack, w: int, *, checkpointing: bool) -> float:
    """Bytes saved for the backward pass of a micro-batch when the forward pass ends.

    With checkpointing each layer saves only its input (Chen et al. 2016, "Training Deep Nets with Sublinear Memory
    Cost", section 3). What is outside the layers is saved in either case: rotary tables or embeddings, ids, and a mask
    for each kind of layer.

    Example: 28 layers of width 3584 in bf16 save 28 * 3584 * 2 = 200 kB per token with checkpointing; 8,192 tokens
    take 1.5 GiB.
    """
    trained_layers = shape.num_layers - shape.frozen_layers
    kept = trained_layers * (w * shape.hidden * pack.tokens if checkpointing else layer_bytes(shape, pack, w))
    # With LoRA no gradient reaches the norm of the embeddings, or the first norm of a decoder.
    first = 0 if shape.adapter_rank and not shape.largest_embedding else 1
    if shape.padded:
        return kept + pack.tokens * (first * 2 * w * shape.hidden + 24) + w * pack.cells
    if shape.own_layers and not checkpointing and trained_layers:
        kept += last_layer_bytes(shape, pack, w) - layer_bytes(shape, pack, w)
    outer = 2 * w * shape.head_dim + 64 - (0 if first or checkpointing else w * shape.hidden)
    return kept + pack.tokens * outer + len(set(shape.windows)) * pack.cells


def layer_bytes(shape: ModelShape, pack: Pack, w: int) -> float:
    """Bytes that one layer saves for a micro-batch."""
    per_token, per_row, per_cell = layer_activations(shape, w)
    per_token += w * shape.adapter_rank * shape.adapted_per_layer  # between the two matrices of LoRA
    bytes_kept = pack.tokens * per_token + pack.rows * per_row + pack.cells * per_cell
    if shape.relative_span:  # keys and queries of all relative positions, per text
        bytes_kept += pack.tokens**2 / pack.cells * 4 * w * shape.relative_span * shape.hidden
    return bytes_kept


def step_memory(shape: ModelShape, layout: Layout, pack: Pack, *, overhead: float) -> MemoryUse:
    """Memory at the moment of a training step when most is in use.

    Static parts are those of Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter
    Models", section 3.1 and stage 3 of section 5, with float32 gradients as `MasterWeights` sums them.
    """
    w, sharded = layout.width, layout.sharded
    trained = 4 * shape.trained_parameters / layout.shards
    # Frozen weights are in the compute dtype or quantized.
    frozen = shape.parameters - shape.trained_parameters - shape.quantized_parameters
    # Without master weights those of the backbone are in the compute dtype alone.
    narrow = 0 if layout.has_masters else (4 - w) * (shape.trained_parameters - shape.head_parameters)
    weights = trained + (w * frozen - narrow) / layout.shards
    weights += shape.quantized_bytes
    average = trained if layout.has_ema else 0.0
    gathered, copy = 0.0, 0.0
    if sharded:  # the current layer, the prefetched one, and what is outside the layers
        gathered = w * (2 * shape.layer_parameters + shape.outer_parameters)
    elif w < 4 and layout.has_masters:
        copy = w * (shape.trained_parameters - shape.head_parameters)
    resident = 0 if layout.offload else 1
    optimizer_state = _optimizer_state(shape, layout) / layout.shards
    gradients, optimizer = resident * trained, resident * optimizer_state
    between_steps = 0 if layout.offload_optimizer else optimizer
    host = (0 if resident else weights + average + trained + optimizer_state) + optimizer - between_steps
    kept = activations(shape, pack, w, checkpointing=layout.checkpointing)
    begin, end = _temporaries(shape, layout, pack)

    def at(moment: str, compute: float, grads: float, moments: float, kept: float, temporary: float) -> MemoryUse:
        return MemoryUse(
            moment, resident * weights, compute, grads, moments, kept, temporary, overhead, host, resident * average
        )

    early = 0 if layout.one_micro_batch else gradients
    return max(
        at("start of the backward pass", gathered + copy, early, between_steps, kept, begin),
        at("end of the backward pass", gathered + copy, gradients, between_steps, 0, end),
        at("optimizer step", copy, gradients, optimizer, 0, _optimizer_temporaries(shape, layout)),
        key=lambda use: use.total,
    )


def _optimizer_state(shape: ModelShape, layout: Layout) -> float:
    """Bytes; of Adafactor a row and a column of each matrix."""
    if layout.optimizer == "adafactor":
        return 4 * 2 * shape.trained_parameters / min(shape.hidden, shape.num_kv_heads * shape.head_dim)
    matrices = min(shape.matrix_parameters, shape.trained_parameters)
    return optimizer_state_bytes(layout.optimizer, shape.trained_parameters, matrices)


def _optimizer_temporaries(shape: ModelShape, layout: Layout) -> float:
    """Of the largest parameter: its float32 copy if it is rounded stochastically, and what its update is made of."""
    largest = min(max(shape.largest_matrix, shape.largest_embedding), shape.trained_parameters) / layout.shards
    part = min(largest, 2**22)  # moments of 8 bits, and the rounding, are computed in parts
    update = {"adafactor": 4 * largest, "adamw_8bit": 17 * part}.get(layout.optimizer, 0)
    if layout.optimizer == "muon":  # the momentum in float32, and three times in bfloat16; if sharded, the whole update
        update = (10 + (4 if layout.sharded else 0)) * min(shape.largest_matrix, shape.trained_parameters)
    return update if layout.has_masters else 4 * largest + max(update, 11 * part)


def _temporaries(shape: ModelShape, layout: Layout, pack: Pack) -> tuple[float, float]:
    """Largest temporary at the start and at the end of the backward pass."""
    w, sharded = layout.width, layout.sharded
    recomputed = layer_bytes(shape, pack, w) if layout.checkpointing else 0
    begin = recomputed + _mlp_gradients(shape, pack, w)
    if shape.own_layers and not layout.checkpointing:
        begin = _after_the_rewards(shape, pack, w)
    # Gradients are computed in the compute dtype and accumulated in float32; FSDP does both for a whole layer.
    summed = w + (4 if w < 4 or sharded else 0)
    begin += summed * (shape.layer_parameters if sharded else shape.largest_matrix)
    begin += w * shape.largest_quantized  # in the compute dtype again, to multiply with it
    if not sharded and layout.one_micro_batch:
        summed = w if w < 4 else 0  # the first gradient needs no accumulation
    end: float = summed * (shape.outer_parameters if sharded else shape.largest_embedding)
    if sharded and not layout.one_micro_batch:  # the new shard, before it is added to the accumulated one
        end += 4 * shape.outer_parameters / layout.shards
    if layout.strategy == "ddp":  # gradients are all-reduced in buckets; a large one has its own
        end = max(end, 4 * max(shape.largest_embedding, min(_BUCKET, shape.trained_parameters)))
    return begin, end


def _after_the_rewards(shape: ModelShape, pack: Pack, w: int) -> float:
    """Temporaries of a decoder's last layer or of the MLP before it, less what the last layer has freed by then."""
    mlp = w * pack.tokens * (2 * shape.intermediate + shape.hidden) - last_layer_bytes(shape, pack, w)
    # The last layer's norm computes in float32, for bf16 with three copies. Keys and values are freed.
    norm = pack.tokens * (w + (12 if w < 4 else 4)) * shape.hidden
    return max(mlp, norm - pack.rows * 2 * w * shape.num_heads * shape.head_dim)


def _mlp_gradients(shape: ModelShape, pack: Pack, w: int) -> float:
    """Live gradients in an MLP, less the saved tensors it has freed: two intermediates if gated, else one."""
    is_gated = not shape.padded or architecture(shape.model_type).gated_mlp
    return w * pack.tokens * ((2 if is_gated else 1) * shape.intermediate - shape.hidden)
