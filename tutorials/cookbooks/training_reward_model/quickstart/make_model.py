"""The quickstart's model: a byte-level BPE tokenizer of its texts, and a small Qwen2 decoder with random weights.

    python -m tutorials.cookbooks.training_reward_model.quickstart.make_model FOLDER TRAIN_PARQUET

Both are saved into one folder in the Hugging Face layout, so that the trainer opens it like any downloaded model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

IM_START, IM_END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY_SIZE = 2048
MAX_TOKENS = 512


def write_model(folder: Path, texts: Path | Iterable[str], *, seed: int = 0) -> Path:
    """Write tokenizer and model into `folder` and return it.

    texts: what the tokenizer learns from, either strings or a parquet file with the columns of `make_data`.
    seed: decides the weights; the global random state of torch is left as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(read_texts(texts) if isinstance(texts, Path) else texts)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Qwen2ForCausalLM(model_config(tokenizer)).save_pretrained(folder)
    return folder


def read_texts(path: Path) -> Iterator[str]:
    """Every message and answer of a preference file, one text at a time."""
    for row in pq.read_table(path).to_pylist():
        yield from (message["content"] for message in row["prompt"])
        yield row["chosen"]
        yield row["rejected"]


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML markers; it can write any text, since all 256 bytes are in it."""
    bpe = Tokenizer(models.BPE())
    # AutoTokenizer opens a folder with a Qwen2 model as Qwen2Tokenizer, which splits and normalises this way.
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[IM_START, IM_END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The names of the roles occur in every conversation, but only in the template.
    bpe.train_from_iterator((*texts, *["system", "user", "assistant"] * 1000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=IM_END,
        pad_token=PAD,
        unk_token=PAD,  # never produced; left out, Qwen2Tokenizer would add a token the model has no row for
        extra_special_tokens=[IM_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def model_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    """Three narrow layers: small enough to learn the set on two processor cores within a minute."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=0.05,  # narrow layers want larger weights than the 0.02 of wide ones
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def main() -> None:
    """Command line: the folder to write to, the texts to learn from, and a seed."""
    parser = argparse.ArgumentParser(description="Train the quickstart's tokenizer and write its untrained model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("train_parquet", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(write_model(arguments.folder, arguments.train_parquet, seed=arguments.seed))


if __name__ == "__main__":
    main()
