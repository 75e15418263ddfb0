"""Fill-in-the-middle records and whole files -> (ids, mask), supervising the middle and its end.

PSM: [prefix] p [suffix] s [middle] m [eot];  SPM: [prefix] [suffix] s [middle] p m [eot]
(Bavarian et al. 2022, the "SPMv2" that published code models use). Knows nothing of files or chat.
"""

from __future__ import annotations

import random
from typing import Any

from configs.fim_tokens import FimIds
from records.rows import Row, RowError, checked
from records.tokens import encode, leading_ids

FIELDS = ("prefix", "middle", "suffix")
FILE_FIELDS = ("text", "content", "code")
MAX_MIDDLE_LINES = 10
CHARS_PER_TOKEN = 8  # more than any tokenizer packs on average: bounds the text that is tokenised


def read_fim(record: dict) -> tuple[str, str, str] | str:
    """(prefix, middle, suffix), or the text of a whole file."""
    remedy = 'write {"prefix": "...", "middle": "...", "suffix": "..."} or {"text": "..."} in rows'
    if not any(field in record for field in FIELDS):
        for field in FILE_FIELDS:
            if field in record:
                if not isinstance(record[field], str):
                    kind = type(record[field]).__name__
                    raise RowError(f"'{field}' is not text", remedy, f"it is {kind}")
                if not record[field].strip():
                    raise RowError(f"empty '{field}'", "remove the row or fill it in")
                return record[field]
    for field in FIELDS:
        if field not in record:
            fields = f"fields: {', '.join(map(str, record)) or 'none'}"
            raise RowError(f"missing field '{field}'", remedy, fields)
        if not isinstance(record[field], str):
            kind = type(record[field]).__name__
            raise RowError(f"'{field}' is not text", remedy, f"it is {kind}")
    if not record["middle"]:
        raise RowError("empty 'middle'", "the middle is what is learnt: remove the row or fill it")
    return record["prefix"], record["middle"], record["suffix"]


def render_fim(
    spans: tuple[str, str, str], tokenizer: Any, tokens: FimIds, max_length: int, spm: bool = False
) -> Row:
    """(prefix, middle, suffix) -> row. Trims the prefix's left and the suffix's right to fit."""
    prefix_text, middle_text, suffix_text = spans
    window = max_length * CHARS_PER_TOKEN
    prefix = _fragment(tokenizer, prefix_text[-window:], tokens, glued=False)
    suffix = _fragment(tokenizer, suffix_text[:window], tokens, glued=True)
    middle = _fragment(tokenizer, middle_text, tokens, glued=True) + [tokens.eot]
    first = leading_ids(tokenizer)
    room = max_length - len(first) - 3 - len(middle)
    if room < 0:
        raise RowError(
            "the middle does not fit in max_length",
            "raise data.max_length, or cut shorter middles",
            f"{len(middle) + len(first) + 3} tokens without any context, max_length {max_length}",
        )
    keep_prefix = min(len(prefix), max(room - room // 2, room - len(suffix)))
    keep_suffix = min(len(suffix), room - keep_prefix)
    truncated = (
        len(prefix_text) > window
        or len(suffix_text) > window
        or keep_prefix < len(prefix)
        or keep_suffix < len(suffix)
    )
    prefix, suffix = prefix[len(prefix) - keep_prefix :], suffix[:keep_suffix]
    if spm:
        head = [tokens.prefix, tokens.suffix, *suffix, tokens.middle, *prefix]
    else:
        head = [tokens.prefix, *prefix, tokens.suffix, *suffix, tokens.middle]
    ids = first + head + middle
    return checked(Row(ids, [0] * (len(ids) - len(middle)) + [1] * len(middle), truncated))


def cut_spans(text: str, count: int, rng: random.Random) -> list[tuple[str, str, str]]:
    """Cut `count` random (prefix, middle, suffix) out of a file.

    Half of the middles are whole lines; half start anywhere in a line and end at the end of that
    line or of a near one, as an editor's completions do. Blank middles are drawn again.
    """
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    spans: list[tuple[str, str, str]] = []
    for _ in range(count * 8):
        if len(spans) == count:
            break
        n = rng.randrange(len(lines))
        start, last = starts[n], min(len(lines), n + rng.randint(1, MAX_MIDDLE_LINES))
        if rng.random() < 0.5:
            start += rng.randrange(len(lines[n]))
            last = min(last, n + rng.randint(1, 3))
            end = starts[last] - (1 if text[: starts[last]].endswith("\n") else 0)
        else:
            end = starts[last]
        if text[start:end].strip():
            spans.append((text[:start], text[start:end], text[end:]))
    if not spans:
        raise RowError("no span could be cut out of this file", "remove the file: it is near empty")
    return spans


def _fragment(tokenizer: Any, text: str, tokens: FimIds, glued: bool) -> list[int]:
    """Ids of `text`; `glued` text of a CodeLlama must not get SentencePiece's leading blank."""
    if not (glued and tokens.family == "codellama"):
        return encode(tokenizer, text)
    anchor = "☺"
    alone, joined = encode(tokenizer, anchor), encode(tokenizer, anchor + text)
    same = joined[: len(alone)] == alone
    return joined[len(alone) :] if same else encode(tokenizer, text)
