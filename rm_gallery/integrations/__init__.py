"""Rewards in RL trainers: reward functions with the signatures of TRL, verl and OpenRLHF (docs/rl.md)."""
