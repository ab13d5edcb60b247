"""Distributed training of one model: DDP and FSDP2, master weights, activation checkpointing."""
