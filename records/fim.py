"""Fill-in-the-middle records and whole files -> (ids, mask), supervising the middle and its end.

PSM: [prefix] p [suffix] s [middle] m [eot];  SPM: [prefix] [suffix] s [middle] p m [eot]
(Bavarian et al. 2022, the "SPMv2" that published code models use)."""

from __future__ import annotations

import itertools
import random
from typing import Any

import regex

from configs.fim_tokens import FimIds
from records.rows import Row, RowError, checked, filled_field, text_field
from records.tokens import encode_literally, leading_ids

FIELDS = ("prefix", "middle", "suffix")
FILE_FIELDS = ("text", "content", "code")
MAX_MIDDLE_LINES = 10
CHARS_PER_TOKEN = 8  # more than any tokenizer packs on average: bounds the text that is tokenised
Spans = tuple[str, str, str]


def read_fim(record: dict) -> Spans | str:
    """(prefix, middle, suffix), or the text of a whole file."""
    remedy = 'write {"prefix": "...", "middle": "...", "suffix": "..."} or {"text": "..."} in rows'
    if not any(field in record for field in FIELDS):
        for field in FILE_FIELDS:
            if field in record:
                return filled_field(record, field, remedy)
    prefix, middle, suffix = (text_field(record, field, remedy) for field in FIELDS)
    if not middle:
        raise RowError("empty 'middle'", "the middle is what is learnt: remove the row or fill it")
    return prefix, middle, suffix


def spans_of(found: Spans | str, count: int, rng: random.Random) -> list[Spans]:
    """What `read_fim` found, a whole file cut into `count` spans."""
    return cut_spans(found, count, rng) if isinstance(found, str) else [found]


def render_fim(
    spans: Spans, tokenizer: Any, tokens: FimIds, max_length: int, spm: bool = False
) -> Row:
    """(prefix, middle, suffix) -> row. Trims the prefix's left and the suffix's right to fit."""
    prefix_text, middle_text, suffix_text = spans
    window = max_length * CHARS_PER_TOKEN
    prefix = fragment(tokenizer, prefix_text[-window:], tokens, glued=False)
    suffix = fragment(tokenizer, suffix_text[:window], tokens, glued=True)
    middle = fragment(tokenizer, middle_text, tokens, glued=True) + [tokens.eot]
    first = leading_ids(tokenizer)
    room = max_length - len(first) - 3 - len(middle)
    if room < 0:
        remedy = "raise data.max_length, or cut shorter middles"
        detail = f"{max_length - room} tokens without any context, max_length {max_length}"
        raise RowError("the middle does not fit in max_length", remedy, detail)
    keep_prefix = min(len(prefix), max(room - room // 2, room - len(suffix)))
    keep_suffix = min(len(suffix), room - keep_prefix)
    truncated = max(len(prefix_text), len(suffix_text)) > window
    truncated |= keep_prefix + keep_suffix < len(prefix) + len(suffix)
    prefix, suffix = prefix[len(prefix) - keep_prefix :], suffix[:keep_suffix]
    if spm:
        head = [tokens.prefix, tokens.suffix, *suffix, tokens.middle, *prefix]
    else:
        head = [tokens.prefix, *prefix, tokens.suffix, *suffix, tokens.middle]
    ids = first + head + middle
    return checked(Row(ids, [0] * (len(ids) - len(middle)) + [1] * len(middle), truncated))


def cut_spans(text: str, count: int, rng: random.Random) -> list[Spans]:
    """Cut `count` random (prefix, middle, suffix) out of a file.

    Half of the middles are whole lines; half start anywhere in a line and end at the end of that
    line or of a near one, as an editor's completions do. Blank middles are drawn again. No cut is
    within a character as people see it: `\\r\\n`, a letter with its accents, an emoji of several."""
    lines = text.splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))]
    spans: list[Spans] = []
    for _ in range(count * 8):
        if len(spans) == count:
            break
        n = rng.randrange(len(lines))
        start, last = starts[n], min(len(lines), n + rng.randint(1, MAX_MIDDLE_LINES))
        end = starts[last]
        if rng.random() < 0.5:
            start += _whole_characters(lines[n], rng.randrange(len(lines[n])))
            end = starts[min(last, n + rng.randint(1, 3))]
            end -= text.endswith("\n", 0, end) + text.endswith("\r\n", 0, end)
        if text[start:end].strip():
            spans.append((text[:start], text[start:end], text[end:]))
    if not spans:
        raise RowError("no span could be cut out of this file", "remove the file: it is near empty")
    return spans


def _whole_characters(line: str, count: int) -> int:
    """The most of `count` characters that end none (Unicode's extended grapheme clusters) early."""
    ends = itertools.accumulate(len(found) for found in regex.findall(r"\X", line))
    return max(itertools.takewhile(count.__ge__, ends), default=0)


def fragment(tokenizer: Any, text: str, tokens: FimIds, glued: bool) -> list[int]:
    """Ids of `text`, control tokens in it as text. `glued` text of a CodeLlama gets no blank."""
    return encode_literally(tokenizer, text, glued and tokens.family == "codellama")
