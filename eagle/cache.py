"""Static key/value cache: one preallocated buffer, a length per row.

L layers, B buffer rows, b rows in use, H key/value heads, C capacity (slots), D head_dim.

Invariant: the context of the i-th row in use is slots 0 … lengths[i]-1 of buffer row order[i]. What
lies past it is scratch for the tree being tried, never read once the tree is gone. `host_lengths`
mirrors `lengths` without a device read, so the live range of a pass is known before it starts; in a
captured graph, where the host knows nothing, it is None and passes see the whole capacity."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from kernels.commit_kv import commit_kv


class StaticKVCache(Cache):
    """Passed to stock models as their cache; the head uses the same class with one layer."""

    def __init__(
        self, num_layers: int, rows: int, kv_heads: int, capacity: int, head_dim: int, dtype, device
    ) -> None:
        super().__init__(layers=[])
        self.buffer = torch.empty(  # never read where it was not written
            num_layers, 2, rows, kv_heads, capacity, head_dim, dtype=dtype, device=device
        )
        self.capacity = capacity
        self._use(list(range(rows)))

    def _use(self, order: list[int]) -> None:
        """Use these buffer rows, in this order and empty."""
        device = self.buffer.device
        self.order = order
        self.rows = torch.tensor(order, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(len(order), dtype=torch.int64, device=device)
        self.host_lengths: list[int] | None = [0] * len(order)

    @property
    def whole(self) -> bool:
        """Are all buffer rows in use, in their own order?"""
        return self.order == list(range(self.buffer.shape[2]))

    def empty_rows(self, order: list[int]) -> StaticKVCache:
        """The same buffer with other rows in use, empty: where new requests are put."""
        other = object.__new__(StaticKVCache)
        other.__dict__.update(self.__dict__)
        other._use(order)
        return other

    def select(self, keep: list[int]) -> None:
        """Go on with these of the rows in use, in this order."""
        index = torch.tensor(keep, dtype=torch.int64, device=self.rows.device)
        self.order = [self.order[i] for i in keep]
        self.host_lengths = [self.host_lengths[i] for i in keep]
        self.rows, self.lengths = self.rows[index], self.lengths[index]

    def join(self, other: StaticKVCache) -> None:
        """Take over the rows in use of `other`, which shares the buffer."""
        assert not set(self.order) & set(other.order)
        self.order = self.order + other.order
        self.host_lengths = self.host_lengths + other.host_lengths
        self.rows = torch.cat([self.rows, other.rows])
        self.lengths = torch.cat([self.lengths, other.lengths])

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, H, C, D] of one layer, views of the buffer."""
        return self.buffer[index].unbind(0)

    def commit(self, path: torch.Tensor, counts: torch.Tensor) -> None:
        """Move the nodes path[i, :counts[i]] of the last tree into the prefix; `advance` must
        follow. path [b, K], counts [b]."""
        if self.whole:
            commit_kv(self.buffer, self.lengths, path, counts)
            return
        # rows out of order: the buffer's own row numbers are needed; unused rows move nothing
        B, K = self.buffer.shape[2], path.shape[1]
        lengths, moved = self.lengths.new_zeros(B), counts.new_zeros(B)
        paths = path.new_zeros(B, K)
        lengths[self.rows], moved[self.rows], paths[self.rows] = self.lengths, counts, path
        commit_kv(self.buffer, lengths, paths, moved)

    def advance(self, counts: torch.Tensor, host_counts: list[int] | None) -> None:
        self.lengths = self.lengths + counts
        if host_counts is not None:
            self.host_lengths = [a + b for a, b in zip(self.host_lengths, host_counts, strict=True)]

    # what transformers asks of a cache; attention itself writes and reads the buffer
    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.updated_layer = layer_idx
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.host_lengths or [0], default=0)

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.capacity

    def __len__(self) -> int:
        return self.buffer.shape[0]
