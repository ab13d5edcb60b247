"""Reward models behind HTTP: `rm-gallery serve`, the protocols it speaks, and the queue in front of each model."""
