"""Names that other trainers use for a setting, and the key that has its meaning here, for messages.

A name is answered rather than accepted: few of them mean exactly the same.
"""

from __future__ import annotations

from collections.abc import Sequence

_PER_STEP = (
    "the number of pairs per optimizer step over all GPUs; micro-batches are packed up to a token budget, and "
    "gradients are accumulated over them"
)
_PRECISION = "auto, bf16 or fp32"

# Name -> key, and what differs. The names of transformers' and TRL's arguments come first.
NAMES: dict[str, tuple[str, str]] = {
    "model_name_or_path": ("model.partial_pretrain", ""),
    "learning_rate": ("optim.lr", ""),
    "num_train_epochs": ("trainer.total_epochs", ""),
    "max_steps": ("trainer.total_training_steps", ""),
    "per_device_train_batch_size": ("data.train_batch_size", _PER_STEP),
    "gradient_accumulation_steps": ("data.train_batch_size", _PER_STEP),
    "per_device_eval_batch_size": ("data.max_tokens_per_micro_batch", "validation packs texts up to a token budget"),
    "output_dir": ("trainer.default_local_dir", "trainer.experiment_name is appended to it"),
    "run_name": ("trainer.experiment_name", ""),
    "logging_steps": ("trainer.log_freq", ""),
    "eval_steps": ("trainer.test_freq", ""),
    "save_steps": ("trainer.save_freq", ""),
    "save_total_limit": ("trainer.max_ckpt_to_keep", ""),
    "load_best_model_at_end": ("trainer.save_best", "best.json names the best checkpoint"),
    "warmup_ratio": ("optim.warmup_steps_ratio", ""),
    "warmup_steps": ("optim.warmup_steps_ratio", "a fraction of all steps"),
    "lr_scheduler_type": ("optim.lr_scheduler", "cosine, wsd or constant"),
    "max_grad_norm": ("optim.clip_grad", ""),
    "adam_beta1": ("optim.betas", "a list: optim.betas=[0.9,0.95]"),
    "adam_beta2": ("optim.betas", "a list: optim.betas=[0.9,0.95]"),
    "adam_epsilon": ("optim.eps", ""),
    "bf16": ("model.fsdp_config.model_dtype", _PRECISION),
    "fp16": ("model.fsdp_config.model_dtype", _PRECISION),
    "torch_dtype": ("model.fsdp_config.model_dtype", _PRECISION),
    "dtype": ("model.fsdp_config.model_dtype", _PRECISION),
    "gradient_checkpointing": ("model.enable_gradient_checkpointing", ""),
    "use_liger_kernel": ("model.use_liger", ""),
    "torch_compile": ("model.compile", ""),
    "fsdp": ("model.strategy", "auto, ddp or fsdp2"),
    "deepspeed": ("model.strategy", "fsdp2 shards weights, gradients and optimizer state"),
    "lora_r": ("model.lora.rank", ""),
    "lora_rank": ("model.lora.rank", ""),
    "lora_alpha": ("model.lora.alpha", ""),
    "lora_dropout": ("model.lora.dropout", ""),
    "lora_target_modules": ("model.lora.target_modules", "all-linear, or a list: [q_proj,v_proj]"),
    "use_dora": ("model.lora.use_dora", ""),
    "use_rslora": ("model.lora.use_rslora", ""),
    "report_to": ("trainer.logger", "e.g. trainer.logger=console,wandb"),
    "resume_from_checkpoint": ("trainer.resume_mode", ""),
    "dataloader_num_workers": ("data.num_workers", ""),
    "dataset_name": ("data.train_files", ""),
    "dataset_train_split": ("data.train_split", ""),
    "dataset_test_split": ("data.val_split", ""),
    "chat_template_path": ("data.chat_template", ""),
    "max_seq_length": ("data.max_length", ""),
    "lr": ("optim.lr", ""),
    "model": ("model.partial_pretrain", ""),
    "model_path": ("model.partial_pretrain", ""),
    "base_model": ("model.partial_pretrain", ""),
    "epochs": ("trainer.total_epochs", ""),
    "num_epochs": ("trainer.total_epochs", ""),
    "total_steps": ("trainer.total_training_steps", ""),
    "batch_size": ("data.train_batch_size", _PER_STEP),
    "micro_batch_size": ("data.micro_batch_size_per_gpu", ""),
    "data": ("data.train_files", ""),
    "dataset": ("data.train_files", ""),
    "train_file": ("data.train_files", ""),
    "train_data": ("data.train_files", ""),
    "val_file": ("data.val_files", ""),
    "val_data": ("data.val_files", ""),
    "eval_file": ("data.val_files", ""),
    "eval_data": ("data.val_files", ""),
    "validation_file": ("data.val_files", ""),
}


def key_for(name: str) -> str | None:
    """`optim.lr`, or `KEY (what differs)`, for a name that another trainer uses; None for an unknown name.

    name: with or without leading dashes or a section, e.g. `--learning-rate` or `optim.learning_rate`.
    """
    found = NAMES.get(name.lstrip("-").rpartition(".")[2].replace("-", "_").lower())
    return found and (f"{found[0]} ({found[1]})" if found[1] else found[0])


def answer_options(arguments: Sequence[str]) -> list[str]:
    """A sentence for each command-line option of another trainer, such as `--lr 1e-5` or `--lr=1e-5`."""
    answers = []
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if not option.startswith("--") or option[2:].replace("-", "_") not in NAMES:
            continue
        following = arguments[place + 1] if place + 1 < len(arguments) else ""
        if not equals and following and not following.startswith("--") and "=" not in following:
            value = following
        key, note = NAMES[option[2:].replace("-", "_")]
        asked = f"{option} {value}".strip()
        example = f"{key}={value}" if value and not note else f"{key}=VALUE"
        answers.append(f"{asked}: write {example}" + (f" ({note})" if note else ""))
    return answers
