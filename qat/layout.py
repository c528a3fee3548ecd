"""How a parameter lies as a matrix of rows: one row per output channel, its inputs along the row.

Every quantizer works on `[R, K]`: R output channels, K numbers that feed one output. Groups run along K, as they do in
every deployment format.

    kind         parameter                          rows
    linear       [O, I]                             [O, I]
    embedding    [V, D]                             [V, D]
    transposed   [I, O]       (Conv1D of GPT-2)     [O, I]
    conv         [O, I/g, *k]                       [O, I/g * prod(k)]
    deconv       [I, O/g, *k] (transposed conv)     [O/g, I * prod(k)]
    experts      [E, O, I]                          [E*O, I]
    experts_t    [E, I, O]                          [E*O, I]
    tokens       [..., I]     (an activation)       [T, I]

Groups are consecutive columns of the rows. Where they are formed over inputs in another order (GPTQ's `desc_act`), the
rows have their columns in that order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

# kind -> the permutation that brings the output dimensions to the front (identity: None), number of output dimensions
_KINDS: dict[str, tuple[tuple[int, ...] | None, int]] = {
    "linear": (None, 1),
    "embedding": (None, 1),
    "transposed": ((1, 0), 1),
    "conv": (None, 1),
    "deconv": ((1, 0), 1),
    "experts": (None, 2),
    "experts_t": ((0, 2, 1), 2),
    "tokens": (None, -1),
}
# parameters that are their own rows
_MATRICES = ("linear", "embedding")


@dataclass(frozen=True)
class Layout:
    """The shape of a parameter and how its rows are taken.

    order   int64 [K], a permutation: column k of the rows is column order[k] of the parameter; None: they are the same
    """

    shape: tuple[int, ...]
    kind: str = "linear"
    order: Tensor | None = field(default=None, compare=False)

    def _permutation(self) -> tuple[int, ...] | None:
        permutation = _KINDS[self.kind][0]
        if permutation is None:
            return None
        return permutation + tuple(range(len(permutation), len(self.shape)))

    @property
    def rows_shape(self) -> tuple[int, int]:
        """`(R, K)`."""
        permutation, outputs = self._permutation(), _KINDS[self.kind][1]
        shape = self.shape if permutation is None else tuple(self.shape[i] for i in permutation)
        if outputs < 0:
            outputs = len(shape) - 1
        return math.prod(shape[:outputs]), math.prod(shape[outputs:])

    def of_rows(self, rows: int) -> Layout:
        """The same with another number of rows; of experts one."""
        shape, outputs = list(self.shape), _KINDS[self.kind][1]
        own = (self._permutation() or tuple(range(len(shape))))[:outputs]
        for i in own:
            shape[i] = rows if i == own[-1] else 1
        return Layout(tuple(shape), self.kind, self.order)

    def of(self, w: Tensor) -> Layout:
        """The layout of a weight is fixed; an activation's is its own shape."""
        return Layout(tuple(w.shape), "tokens") if self.kind == "tokens" else self

    @property
    def is_permutation(self) -> bool:
        """Whether `order` has every column once."""
        count = None if self.order is None else self.order.bincount(minlength=self.order.numel())
        return count is None or bool((count == 1).all())

    def ordered(self, columns: Tensor) -> Tensor:
        """`[..., K]` as the parameter has it -> as the rows do."""
        return columns if self.order is None else columns.index_select(-1, self.order)

    def unordered(self, columns: Tensor) -> Tensor:
        """The inverse of `ordered`."""
        return columns if self.order is None else torch.empty_like(columns).index_copy_(-1, self.order, columns)

    def to_rows(self, w: Tensor) -> Tensor:
        """`shape` -> `[R, K]`; w itself where it is its own rows, a view where the memory order allows it."""
        if self.order is None and self.kind in _MATRICES:
            return w
        permutation = self._permutation()
        return self.ordered((w if permutation is None else w.permute(permutation)).reshape(self.rows_shape))

    def from_rows(self, rows: Tensor) -> Tensor:
        """`[R, K]` -> `shape`."""
        permutation, rows = self._permutation(), self.unordered(rows)
        if permutation is None:
            return rows.reshape(self.shape)
        permuted = rows.reshape([self.shape[i] for i in permutation])
        inverse = [permutation.index(i) for i in range(len(permutation))]
        return permuted.permute(inverse)
