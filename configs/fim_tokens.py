"""The fill-in-the-middle tokens of the model families."""

from __future__ import annotations

from typing import Any, NamedTuple

from configs.errors import ConfigError

QWEN_ENDS = ("<|endoftext|>", "<|file_separator|>")
# family -> (prefix, suffix, middle, candidates for the end token; the tokenizer's EOS comes last)
FAMILIES = {
    "qwen": ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", QWEN_ENDS),
    "starcoder": ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", ("<|endoftext|>",)),
    "santacoder": ("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ("<|endoftext|>",)),
    "codellama": ("▁<PRE>", "▁<SUF>", "▁<MID>", ("▁<EOT>",)),
    "deepseek": ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", ("<｜end▁of▁sentence｜>",)),
}
FIM_TOKENS = {token for *tokens, ends in FAMILIES.values() for token in (*tokens, *ends)}


class FimIds(NamedTuple):
    prefix: int
    suffix: int
    middle: int
    eot: int
    family: str


def find_fim_tokens(tokenizer: Any, given: Any | None = None) -> FimIds:
    """The family's own FIM tokens, or the `given` ones (prefix, suffix, middle, eot as text)."""
    vocabulary = tokenizer.get_vocab()
    if given is not None:
        names = (given.prefix, given.suffix, given.middle, given.eot)
        absent = [name for name in names if name not in vocabulary]
        if absent:
            raise ConfigError(f"data.fim_tokens: {absent[0]!r} is not a token of this tokenizer")
        return FimIds(*(vocabulary[name] for name in names), family="config")
    for family, (prefix, suffix, middle, ends) in FAMILIES.items():
        if all(name in vocabulary for name in (prefix, suffix, middle)):
            known = [vocabulary[name] for name in ends if name in vocabulary]
            eot = known[0] if known else tokenizer.eos_token_id
            if eot is not None:
                return FimIds(*(vocabulary[t] for t in (prefix, suffix, middle)), eot, family)
    raise ConfigError(
        "this tokenizer has no fill-in-the-middle tokens of a known family "
        f"({', '.join(FAMILIES)}): use a code model that was trained with them, or name them with "
        "'data.fim_tokens={prefix: ..., suffix: ..., middle: ..., eot: ...}'"
    )
