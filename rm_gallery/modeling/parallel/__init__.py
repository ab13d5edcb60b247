"""One model over several processes: strategies, master weights, activation checkpointing."""
