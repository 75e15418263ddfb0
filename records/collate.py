"""Rows -> padded tensors. Padding is known by length, never by token id (pad may equal eos).

B rows, T tokens of the longest row, rounded up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Collator:
    """Pads on the right with `pad_id` up to a multiple of `pad_to_multiple`. Returns `input_ids`
    [B, T] int64, `attention_mask` [B, T] bool (real tokens), `loss_mask` [B, T] bool (supervised
    targets), and of rows of a mixture `source` [B] int64 (else 0), `loss_weight` [B] fp32 (1)."""

    def __init__(self, pad_id: int = 0, pad_to_multiple: int = 1) -> None:
        assert pad_to_multiple >= 1, pad_to_multiple
        self.pad_id, self.pad_to_multiple = pad_id, pad_to_multiple

    def padded(self, length: int) -> int:
        """The width of a batch whose longest row has `length` tokens."""
        return -(-length // self.pad_to_multiple) * self.pad_to_multiple

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        width = self.padded(max(lengths))
        input_ids = torch.full((len(rows), width), self.pad_id, dtype=torch.int64)
        loss_mask = torch.zeros((len(rows), width), dtype=torch.bool)
        for n, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            assert len(row["loss_mask"]) == length, (len(row["loss_mask"]), length)
            input_ids[n, :length] = torch.as_tensor(row["input_ids"], dtype=torch.int64)
            loss_mask[n, :length] = torch.as_tensor(row["loss_mask"], dtype=torch.bool)
        attention_mask = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "loss_mask": loss_mask,
            "source": torch.tensor([row.get("source", 0) for row in rows]),
            "loss_weight": torch.tensor([float(row.get("loss_weight", 1)) for row in rows]),
        }
