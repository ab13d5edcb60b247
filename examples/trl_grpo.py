"""GRPO or RLOO of TRL with the rewards of a reward model.

    python examples/trl_grpo.py --policy POLICY --reward-model checkpoints/bt/my-rm --prompts prompts.parquet

The reward model is a folder, a run, an ensemble A+B, or the URL of a reward server. The prompts are a parquet or JSON
lines file with a column `prompt` (messages or text). Needs TRL.
"""

from __future__ import annotations

import argparse
from typing import Any

from rm_gallery.integrations.trl import reward_function


def make_trainer(
    policy: Any, reward_model: Any, prompts: Any, *, algorithm: str = "grpo", tokenizer: Any = None, **settings: Any
) -> Any:
    """The trainer of TRL. prompts: a `datasets.Dataset`. settings: of `GRPOConfig` or `RLOOConfig`."""
    import trl

    config = {"grpo": trl.GRPOConfig, "rloo": trl.RLOOConfig}[algorithm](**settings)
    trainer = {"grpo": trl.GRPOTrainer, "rloo": trl.RLOOTrainer}[algorithm]
    return trainer(
        model=policy,
        reward_funcs=reward_function(reward_model),  # or the folder itself, for decoders: see docs/rl.md
        args=config,
        train_dataset=prompts,
        processing_class=tokenizer,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="GRPO or RLOO of TRL with a reward model of RM-Gallery.")
    parser.add_argument("--policy", required=True)
    parser.add_argument("--reward-model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--algorithm", choices=("grpo", "rloo"), default="grpo")
    parser.add_argument("--output", default="policy")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()

    import torch
    from datasets import load_dataset

    kind = "parquet" if arguments.prompts.endswith(".parquet") else "json"
    prompts = load_dataset(kind, data_files=arguments.prompts, split="train").select_columns("prompt")
    trainer = make_trainer(
        arguments.policy,
        arguments.reward_model,
        prompts,
        algorithm=arguments.algorithm,
        output_dir=arguments.output,
        max_steps=arguments.steps,
        report_to="none",
        **({} if torch.cuda.is_available() else {"use_cpu": True, "bf16": False}),
    )
    trainer.train()
    trainer.save_model(arguments.output)


if __name__ == "__main__":
    main()
