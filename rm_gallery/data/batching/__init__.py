"""Batching: plan of steps -> prompt sharing -> bin packing into micro-batches -> packed batches -> loader."""
