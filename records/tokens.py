"""Text -> token ids with the character span of each token."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

from eagle import loading
from eagle.errors import EagleError


def load_tokenizer(base: str | None = None) -> Any:
    """The tokenizer of a target model; `None` is the embedded model's."""
    tokenizer = loading.load_tokenizer(base)
    require_fast(tokenizer)
    return tokenizer


def require_fast(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise EagleError(
            f"{type(tokenizer).__name__} gives no character offsets; convert it to a fast "
            "tokenizer (a folder with tokenizer.json)"
        )


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` alone: no BOS, no EOS."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode_with_spans(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and, for each, the half-open character span of `text` it covers.

    Some tokenizers report offsets with the white space trimmed off. Byte-level pieces spell their
    bytes: where they spell the text exactly, the spans come from them."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    spans = _byte_spans(tokenizer, ids, text)
    return ids, spans or [(int(start), int(end)) for start, end in encoded["offset_mapping"]]


def leading_ids(tokenizer: Any) -> list[int]:
    """`[bos]` for a tokenizer that begins plain text with it, else `[]`."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    return [bos] if list(tokenizer("a", verbose=False)["input_ids"])[:1] == [bos] else []


def end_ids(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def added_tokens(tokenizer: Any) -> set[str]:
    """Special and added tokens as text: what ends a turn is one of them."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return {token for token in added | set(tokenizer.all_special_tokens) if token.strip()}


@functools.lru_cache(maxsize=4)
def special_tokens(tokenizer: Any, size: int) -> frozenset[str]:
    """Those that a template writes and a text must not hold. size: of the tokenizer, which may
    grow."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return frozenset({*added, *tokenizer.all_special_tokens})


def tokenizer_hash(tokenizer: Any) -> str:
    """Changes when the vocabulary, merges, normalisation, special tokens or template do."""
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(repr((tokenizer.chat_template, tokenizer.special_tokens_map)).encode())
    return digest.hexdigest()


def _byte_spans(tokenizer: Any, ids: list[int], text: str) -> list[tuple[int, int]] | None:
    """Spans from the bytes that byte-level pieces spell; None when they do not spell `text`."""
    decoder = _byte_decoder()
    specials = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    pieces = []
    for i, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if i in specials:
            pieces.append(specials[i].encode())
        elif all(char in decoder for char in piece):
            pieces.append(bytes(decoder[char] for char in piece))
        else:
            return None
    if b"".join(pieces) != text.encode("utf-8", "surrogatepass"):
        return None
    char_of_byte = [c for c, char in enumerate(text) for _ in char.encode("utf-8", "surrogatepass")]
    spans, position = [], 0
    for piece in pieces:
        end = position + len(piece)
        spans.append((char_of_byte[position], char_of_byte[end - 1] + 1) if piece else (0, 0))
        position = end
    return spans


@functools.lru_cache(maxsize=1)
def _byte_decoder() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {char: byte for byte, char in bytes_to_unicode().items()}
