"""What a renderer returns, and how it says no."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """Token ids and, of the same length, 1 where the token is a supervised target. unused: fields
    of the record that were not used."""

    input_ids: list[int]
    loss_mask: list[int]
    truncated: bool = False
    unused: tuple[str, ...] = ()


class RowError(Exception):
    """A record that cannot be trained on. `reason` groups alike rows; `detail` is of this one."""

    def __init__(self, reason: str, remedy: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.remedy = remedy


def fields_of(record: dict) -> str:
    return f"fields: {', '.join(map(str, record)) or 'none'}"


def text_field(record: dict, field: str, remedy: str) -> str:
    if field not in record:
        raise RowError(f"missing field '{field}'", remedy, fields_of(record))
    if not isinstance(record[field], str):
        raise RowError(f"'{field}' is not text", remedy, f"it is {type(record[field]).__name__}")
    return record[field]


def filled_field(record: dict, field: str, remedy: str) -> str:
    """Text that is more than white space."""
    if not text_field(record, field, remedy).strip():
        raise RowError(f"empty '{field}'", "remove the row or fill it in")
    return record[field]


def checked(row: Row) -> Row:
    """Refuse a mask that supervises nothing, or that leaves nothing to predict from."""
    ids, mask = row.input_ids, row.loss_mask
    assert len(ids) == len(mask), (len(ids), len(mask))
    if len(ids) < 2:
        raise RowError("too short", "remove rows with fewer than two tokens")
    if not any(mask):
        raise RowError(
            "all-zero loss mask", "supervise at least one token of the row (check loss_mask/labels)"
        )
    if all(mask):
        raise RowError("all-one loss mask", "the first token has nothing before it: mask it with 0")
    return row


def cut_right(ids: list[int], mask: list[int], max_length: int) -> Row:
    """Keep the first `max_length` tokens; refuse when no supervised token is left."""
    if len(ids) <= max_length:
        return checked(Row(ids, mask))
    if any(mask) and not any(mask[:max_length]):
        raise RowError(
            "the supervised part lies beyond max_length",
            "raise data.max_length, or shorten what comes before it",
            f"first target at token {mask.index(1)}, row has {len(ids)}, max_length {max_length}",
        )
    return checked(Row(ids[:max_length], mask[:max_length], truncated=True))
