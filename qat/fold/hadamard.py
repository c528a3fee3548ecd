"""Orthogonal matrices that spread one large channel over all of them: randomized Hadamard matrices.

    Q = D H / sqrt(n)      D random signs, H a Hadamard matrix (entries 1 and -1, H H^T = n I)

H = kron(Sylvester's matrix of order 2^k, a core of order m). Cores are Paley's (1933), for a prime p:

    m = p + 1,      p = 3 mod 4     I + S,                       S = [[0, 1], [-1, C]],  C[i, j] = (i - j | p)
    m = 2 (p + 1),  p = 1 mod 4     kron(S, [[1, 1], [1, -1]]) + kron(I, [[1, -1], [-1, -1]]),  S = [[0, 1], [1, C]]

Products with H are sums in a fixed order, so every machine gets the same bits. Where no core is known, Q is the
orthogonal factor of a matrix of normal numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# a product with a core takes as many passes as it has rows
_LARGEST_CORE = 512


class Rotation:
    """x [..., n] -> x Q [..., n]; Q is orthogonal and depends on n and the seed alone."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.size = size
        self.signs = 2.0 * torch.randint(2, (size,), generator=generator).double() - 1.0
        order = core_order(size)
        self.core = core(order) if order else None
        self.dense: Tensor | None = None
        if self.core is None:
            q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
            # the factor is unique once its diagonal is positive
            self.dense = q * r.diagonal().sign()

    def __call__(self, x: Tensor) -> Tensor:
        x = x * self.signs.to(x)
        if self.core is None:
            assert self.dense is not None
            return x @ self.dense.to(x)
        order = len(self.core)
        y = x.reshape(*x.shape[:-1], -1, order)
        if order > 1:
            found = torch.zeros_like(y)
            for i, row in enumerate(self.core.to(x)):
                found += y[..., i : i + 1] * row
            y = found
        step = 1
        while step < self.size // order:
            a, b = y.reshape(*x.shape[:-1], -1, 2, step, order).unbind(-3)
            y = torch.stack((a + b, a - b), -3)
            step *= 2
        return y.reshape(x.shape) / math.sqrt(self.size)


def core_order(size: int) -> int:
    """The smallest order m of a core with size = 2^k m; 0 if none is known."""
    odd = size
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return 1
    order = 4 * odd
    while order <= min(size, _LARGEST_CORE):
        if size % order == 0 and (_prime(order - 1) or _double(order)):
            return order
        order *= 2
    return 0


def core(order: int) -> Tensor:
    """fp64 [m, m] of 1 and -1 for an order that `core_order` gives."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    twice = not _prime(order - 1)
    p = order // 2 - 1 if twice else order - 1
    squares = {i * i % p for i in range(1, p)}
    legendre = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, p)], dtype=torch.float64)
    place = torch.arange(p)
    inner = legendre[(place[:, None] - place) % p]
    s = torch.zeros(p + 1, p + 1, dtype=torch.float64)
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1.0, 1.0 if twice else -1.0, inner
    one = torch.eye(p + 1, dtype=torch.float64)
    if not twice:
        return one + s
    a = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(s, a) + torch.kron(one, b)


def _double(order: int) -> bool:
    p = order // 2 - 1
    return p % 4 == 1 and _prime(p)


def _prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, math.isqrt(n) + 1))
