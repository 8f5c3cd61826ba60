"""Which tokens end an answer of a GGUF model: a file names one, and its model may use two or three."""

from __future__ import annotations

from typing import Any

from nest_runtime.model.gguf.header import Header

# Texts of tokens that llama.cpp lets end an answer in any vocabulary (llama-vocab.cpp).
_USUAL = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<end_of_turn>"),
        *("<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>"),
        *("<turn|>", "<｜end▁of▁sentence｜>", "[e~["),
    )
)
_NAMED = ("eos_token_id", "eot_token_id", "eom_token_id")
_MARK = "An answer."


def end_tokens(header: Header, tokenizer: Any) -> list[int]:
    """Token ids that end an answer, the file's own first.

    They are the ends the file names, the special token that the chat template writes behind an answer, and special
    tokens by whose text llama.cpp ends an answer too.
    """
    specials = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    named = [header.get(f"tokenizer.ggml.{key}") for key in _NAMED]
    usual = [token for token in sorted(specials) if tokenizer.convert_ids_to_tokens(token) in _USUAL]
    found = [*named, _after_answer(tokenizer, specials), *usual]
    return list(dict.fromkeys(token for token in found if isinstance(token, int) and 0 <= token < len(tokenizer)))


def _after_answer(tokenizer: Any, specials: set[int]) -> int | None:
    """The special token that the chat template writes behind an answer; None if it writes none."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return None
    talk = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": _MARK}]
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False)
    except (TemplateError, ValueError, TypeError):
        return None  # a template that takes no such conversation says nothing of ends
    _, found, rest = str(text).rpartition(_MARK)
    behind = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    return int(behind[0]) if behind and behind[0] in specials else None
