"""Static key/value cache: one preallocated buffer, a length per row.

Knows slots and lengths; knows nothing of tokens, trees or models.

L layers, B rows, H key/value heads, C capacity (slots), D head_dim, N new slots, M tree slots.

Invariant: row b's context is slots 0 … lengths[b]-1, contiguous. What lies past it is scratch for the
tree being tried; it is never read once the tree is gone. `host_lengths` mirrors `lengths` without a
device read, so the live range of a pass is known before it starts.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from kernels.commit_kv import commit_kv


class StaticKVCache(Cache):
    """Passed to stock models as `past_key_values`; the head uses the same class with one layer."""

    def __init__(
        self,
        num_layers: int,
        rows: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(layers=[])
        self.buffer = torch.zeros(
            num_layers, 2, rows, kv_heads, capacity, head_dim, dtype=dtype, device=device
        )
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.host_lengths = [0] * rows
        self.capacity = capacity
        self._start: int | torch.Tensor = 0
        self._live = 0
        self._rows = torch.arange(rows, device=device)[:, None]

    @property
    def ragged(self) -> bool:
        return min(self.host_lengths) != max(self.host_lengths)

    def row_ends(self, tree_slots: int) -> list[int] | None:
        """Each row's length + tree_slots where rows differ in length, else None."""
        return [n + tree_slots for n in self.host_lengths] if self.ragged else None

    def open(self, new: int, offset: int = 0) -> int:
        """Point the next pass at slots length+offset … length+offset+new-1 of each row.

        Returns the live bound S = max(lengths) + offset + new. Prefix and scratch must fit the capacity.
        """
        self._live = max(self.host_lengths) + offset + new
        assert self._live <= self.capacity, f"{self._live} slots do not fit {self.capacity}"
        if self.ragged:
            step = torch.arange(offset, offset + new, device=self.lengths.device)
            self._start = self.lengths[:, None] + step  # [B, N] slots
        else:
            self._start = self.host_lengths[0] + offset
        return self._live

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Write [B, H, N, D] at the open slots; return keys and values [B, H, S, D] (views)."""
        layer = self.buffer[layer_idx]
        keys, values = layer[0], layer[1]
        N = key_states.shape[2]
        if isinstance(self._start, int):
            keys[:, :, self._start : self._start + N] = key_states
            values[:, :, self._start : self._start + N] = value_states
        else:  # advanced indices on dims 0 and 2 come to the front: [B, N, H, D]
            keys[self._rows, :, self._start] = key_states.transpose(1, 2)
            values[self._rows, :, self._start] = value_states.transpose(1, 2)
        return keys[:, :, : self._live], values[:, :, : self._live]

    def commit(self, path: torch.Tensor, counts: torch.Tensor) -> None:
        """Move the nodes path[b, :counts[b]] of the last tree into the prefix. path [B, K], counts [B].

        `advance` must follow once the counts are known on the host.
        """
        commit_kv(self.buffer, self.lengths, path, counts)

    def advance(self, counts: torch.Tensor, host_counts: list[int]) -> None:
        self.lengths = self.lengths + counts
        self.host_lengths = [a + b for a, b in zip(self.host_lengths, host_counts, strict=True)]

    # what transformers asks of a cache
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.host_lengths)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return max(self.host_lengths)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._live, 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.capacity

    def __len__(self) -> int:
        return self.buffer.shape[0]
