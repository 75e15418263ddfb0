"""One renderer per format: a record -> rows of (input_ids, loss_mask) built together."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

from configs.fim_tokens import find_fim_tokens
from configs.schema import DataConfig
from records.chat import encode_plain, render_chat, render_instruction, require_template
from records.fields import OTHERS, unused_fields
from records.fim import read_fim, render_fim, spans_of
from records.quarantine import refuse
from records.rows import Row, RowError, cut_right, fields_of
from records.tokens import require_fast

Renderer = Callable[[dict], "list[Row]"]


def make_renderer(data_format: str, cfg: DataConfig, tokenizer: Any) -> Renderer:
    """Renderer of `data_format`. Raises EagleError when the tokenizer cannot serve it."""
    require_fast(tokenizer)
    length, supervise, template = cfg.max_length, cfg.supervise, cfg.instruction_template
    if data_format == "chat" or (data_format == "instruction" and template == "chat"):
        require_template(tokenizer)
    renderers: dict[str, tuple] = {
        "chat": (render_chat, tokenizer, length, supervise),
        "instruction": (render_instruction, tokenizer, length, supervise, template),
        "plain": (encode_plain, tokenizer, length),
        "tokenized": (render_tokenized, len(tokenizer), length),
    }
    if data_format == "fim":
        all_rows = _fim_renderer(cfg, tokenizer)
    else:
        render, *settings = renderers[data_format]

        def all_rows(record: dict) -> list[Row]:
            return [render(record, *settings)]

    def rows(record: dict) -> list[Row]:
        first, *others = all_rows(record)
        if data_format in OTHERS:
            first = first._replace(unused=unused_fields(record, data_format))
        if cfg.strict:
            refuse(first.unused, data_format)
        return [first, *others]

    return rows


def _fim_renderer(cfg: DataConfig, tokenizer: Any) -> Renderer:
    tokens = find_fim_tokens(tokenizer, cfg.fim_tokens)

    def render(record: dict) -> list[Row]:
        found = read_fim(record)
        rng = random.Random(f"{cfg.seed}:{record_key(found)}")
        rows, refused = [], None
        for span in spans_of(found, cfg.fim_spans_per_file, rng):
            spm = rng.random() < cfg.fim_spm_rate
            try:
                rows.append(render_fim(span, tokenizer, tokens, cfg.max_length, spm))
            except RowError as error:
                refused = error
        if refused and not rows:
            raise refused
        return rows

    return render


def render_tokenized(record: dict, vocab_size: int, max_length: int) -> Row:
    """`input_ids` with `loss_mask` (0/1), or with `labels` (-100 where not supervised)."""
    remedy = 'write {"input_ids": [...], "loss_mask": [0, 1, ...]} or "labels" with -100'
    if "input_ids" not in record:
        raise RowError("missing field 'input_ids'", remedy, fields_of(record))
    key = "loss_mask" if "loss_mask" in record else "labels"
    if key not in record:
        raise RowError("missing field 'loss_mask' or 'labels'", remedy, fields_of(record))
    ids, marks = record["input_ids"], record[key]
    for name, values in (("input_ids", ids), (key, marks)):
        kinds = {int} if name == "input_ids" else {int, bool}
        if not isinstance(values, list) or not kinds >= set(map(type, values)):
            raise RowError(f"'{name}' is not a list of integers", remedy)
    if len(ids) != len(marks):
        detail = f"{len(marks)} and {len(ids)}"
        raise RowError(f"'{key}' has another length than 'input_ids'", remedy, detail)
    if outside := [i for i in ids if not 0 <= i < vocab_size]:
        detail = f"{outside[0]}, vocabulary {vocab_size}"
        remedy = "tokenise with the target's tokenizer"
        raise RowError("token id outside the vocabulary", remedy, detail)
    if key == "labels":
        if any(label not in (-100, i) for i, label in zip(ids, marks, strict=True)):
            remedy = "labels are not shifted: label i equals input id i where it is supervised"
            raise RowError("a label is neither -100 nor its input id", remedy)
        marks = [label != -100 for label in marks]
    elif any(mark not in (0, 1) for mark in marks):
        raise RowError("'loss_mask' holds other values than 0 and 1", remedy)
    # nothing precedes the first token: it cannot be a target
    return cut_right(list(ids), [0, *map(int, marks[1:])][: len(ids)], max_length)


def record_key(record: Any) -> int:
    """Stable 62-bit hash of a record's content: decides its split and seeds its FIM cut."""
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, default=str)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 2
