"""Tokenizers with the chat templates that people meet: ChatML, one that writes reasoning, `[INST]`, and none."""

from __future__ import annotations

from typing import Any

from tests.small import CHATML, make_tokenizer

# Like Qwen3's: the last assistant turn gets a block for reasoning, earlier ones lose theirs.
QWEN3 = (
    "{% set ns = namespace(query=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.query = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.query %}"
    "<think>\n\n</think>\n\n{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Llama 2's: no roles of its own, no system turn, texts trimmed, BOS at each question.
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content.strip() }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content.strip() }} {{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
TEMPLATES = ("chatml", "qwen3", "inst", "none", "none_with_bos")


def make_templated(name: str) -> Any:
    """A byte tokenizer with the template of this name; `none_with_bos` puts BOS before raw texts by itself."""
    from tokenizers import processors

    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"chatml": CHATML, "qwen3": QWEN3, "inst": INST}.get(name)
    if name in ("inst", "none_with_bos"):
        tokenizer.add_special_tokens({"bos_token": "<|endoftext|>"})
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
        )
    return tokenizer
