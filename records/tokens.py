"""Text -> token ids with the character span of each token.

A control token that stands literally in data is text: `as_text` puts BREAK into it, which ends a
piece that is encoded on its own, and is not encoded itself."""

from __future__ import annotations

import functools
import hashlib
import re
from typing import Any

from configs.fim_tokens import FIM_TOKENS
from eagle import loading
from eagle.errors import EagleError

BREAK = "\udfff"  # half a character: rows that have one are refused where they are read
ANCHOR = "☺"


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


def as_text(tokenizer: Any, text: str) -> str:
    """`text` with BREAK in every special or FIM token that it spells out."""
    pattern = _control_tokens(tokenizer, len(tokenizer))
    return pattern.sub(rf"\g<0>{BREAK}", text) if pattern else text


@functools.lru_cache(maxsize=8)
def _control_tokens(tokenizer: Any, size: int) -> re.Pattern | None:
    """What finds the first character of each. size: of the vocabulary, which may grow."""
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    names = {name for name, special in added.items() if special or name in FIM_TOKENS}
    names |= {name for name in added if re.fullmatch(r"<[|｜].*[|｜]>", name)}
    found = "|".join(
        re.escape(name) for name in names | set(tokenizer.all_special_tokens) if name.strip()
    )
    return re.compile(f"(?={found}).", re.DOTALL) if found else None


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` alone: no BOS, no EOS."""
    first, *rest = text.split(BREAK)
    ids = list(tokenizer(first, add_special_tokens=False, verbose=False)["input_ids"])
    return ids + [token for piece in rest for token in encode_glued(tokenizer, piece)]


def encode_glued(tokenizer: Any, text: str) -> list[int]:
    """Ids of text that goes on where other text ends: without SentencePiece's leading blank."""
    alone, joined = encode(tokenizer, ANCHOR), encode(tokenizer, ANCHOR + text)
    same = joined[: len(alone)] == alone
    return joined[len(alone) :] if same else encode(tokenizer, text)


def encode_with_spans(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and, for each, the half-open character span of `text` it covers.

    Some tokenizers report offsets with the white space trimmed off. Byte-level pieces spell their
    bytes: where they spell the text exactly, the spans come from them."""
    ids, spans, start = [], [], 0
    for piece in text.split(BREAK):
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        encoded = tokenizer(piece, **options)
        found = list(encoded["input_ids"])
        places = _byte_spans(tokenizer, found, piece) or encoded["offset_mapping"]
        ids += found
        spans += [(int(left) + start, int(right) + start) for left, right in places]
        start += len(piece) + len(BREAK)
    return ids, spans


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
