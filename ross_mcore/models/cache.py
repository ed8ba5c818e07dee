"""Keys and values of the tokens of a batch's rows, so that a new token runs alone.

Legend: n rows, h heads and g query groups of a layer, D size of a head, C columns of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ross_mcore import platform


class KeyValueCache:
    """The keys and values of every layer, rows aligned at their last tokens.

    So every row's next token goes into the same column: appending is one copy, and one mask, made when rows leave,
    hides the columns before a row's first token. Memory is taken once: in every layer 2 * n * g * C * D numbers, with
    C the tokens of the longest prompt and all new ones.
    """

    def __init__(self, lengths: Sequence[int], new_tokens: int) -> None:
        """lengths: tokens of each row's prompt; new_tokens: how often `advance` may be called."""
        self.end = max(lengths)
        self.columns = self.end + new_tokens
        self.starts = [self.end - length for length in lengths]
        self.layers: dict[int, Tensor] = {}
        self.mask: Tensor | None = None

    def fill(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Stores a layer's keys and values of the prompts, one row after the other, [tokens of all rows, g, D]."""
        lengths = [self.end - start for start in self.starts]
        _, groups, size = key.shape
        stored = key.new_empty(2, len(lengths), groups, self.columns, size)
        for into, part in zip(stored, (key, value), strict=True):
            for row, tokens in enumerate(part.split(lengths)):
                into[row, :, : self.starts[row]] = 0  # hidden by the mask; but what is not a number would spread
                into[row, :, self.starts[row] : self.end] = tokens.transpose(0, 1)
        self.layers[layer] = stored

    def advance(self) -> Tensor:
        """Makes room for the next token of every row; returns their positions [n] int64, on this process's device."""
        if self.mask is None and len(set(self.starts)) > 1:
            self._hide()
        self.end += 1
        return platform.upload(torch.tensor([self.end - 1 - start for start in self.starts]), platform.device())

    def attend(self, layer: int, query: Tensor, newest: Tensor) -> Tensor:
        """query [n, g, h / g, D], keys and values of the newest tokens [2, n, g, D] -> [n, h * D].

        The heads of a group attend to the same keys, so they take the place of a sequence of queries.
        """
        stored, rows = self.layers[layer], len(self.starts)
        stored[:, :rows, :, self.end - 1] = newest
        keys, values = stored[:, :rows, :, min(self.starts) : self.end]
        mask = None if self.mask is None else self.mask[..., min(self.starts) : self.end]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask).flatten(1)

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Keeps some rows and forgets the others; returns the rows in their new order.

        A row that is kept stays in its place, or fills one that becomes free: few rows are copied, and none but those.
        """
        count = len(rows)
        order, moved = list(range(count)), [row for row in rows if row >= count]
        for free in sorted(set(range(count)) - set(rows)):
            order[free] = moved.pop()
            for layer in self.layers.values():
                layer[:, free] = layer[:, order[free]]
        self.starts, self.mask = [self.starts[row] for row in order], None
        return order

    def _hide(self) -> None:
        """The mask added to scores, [n, 1, 1, C]: -inf in the columns before a row's first token."""
        hidden = torch.arange(self.columns) < torch.tensor(self.starts)[:, None]
        dtype = next(iter(self.layers.values())).dtype
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, float("-inf"))
        self.mask = platform.upload(mask, platform.device())[:, None, None]
