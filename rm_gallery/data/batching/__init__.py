"""Batching: token groups become steps, micro-batches of like cost, and packed tensors."""
