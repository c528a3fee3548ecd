"""Rounding a weight column by column, each error made good by the columns that are still to come.

Rows w [R, K] meet inputs x with the Hessian H = sum x x^T [K, K] of the squared error |w x - q x|^2 (up to a factor).
With the columns in the order in which they are rounded and U the upper triangular matrix with H^-1 = U^T U:

    q_j = round(w_j),    e = (w_j - q_j) / U_jj,    w_l -= e U_jl  for all l > j

which is the optimal brain surgeon's update (GPTQ, Frantar et al. 2023, arXiv 2210.17323, equation 2 and algorithm 1).
Scales are chosen before (static groups), so the order is free: `act_order` takes columns with large inputs first, as
long as many others are left to make good for them.

U comes from one Cholesky factorization, not from H^-1: with J the reversal of rows and columns and J H J = L L^T, the
matrix M = J L J is upper triangular and H = M M^T, hence H^-1 = M^-T M^-1 and U = M^-1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qat.errors import QATError
from qat.qtensor import Fields
from qat.specs import QuantSpec

# Larger matrices are factorized in fp32, to keep them in memory: an fp64 one of this size is half a GiB.
_LARGEST_FP64 = 8192
# Columns whose updates of the later ones are made together (Frantar et al. 2023, section 3.3).
_LAZY = 128
# What damping becomes where the factorization fails, and how often it is raised tenfold after that.
_SMALLEST_RAISE, _RAISES = 1e-3, 6


class Rounded(NamedTuple):
    """weights [R, K] fp32 on the grid; latents [R, K] fp32, each column as it was before it was rounded; damp, the
    damping that was used."""

    weights: Tensor
    latents: Tensor
    damp: float


def hat(w_RN: Tensor, fields: Fields, spec: QuantSpec) -> Tensor:
    """The numbers of the grid, fp32 [R, N], that fp32 w_RN becomes; fields [R, G] with N % G == 0, or [1, 1].

    All that this package knows of a grid: infinities give its ends.
    """
    return spec.grid.fake_quantize(w_RN, *fields)


def wide(device: torch.device) -> torch.dtype:
    """fp64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@torch.no_grad()
def solve(
    w_RK: Tensor, hessian_KK: Tensor, fields: Fields, spec: QuantSpec, *, damp: float = 0.01, act_order: bool = True
) -> Rounded:
    """GPTQ of rows w_RK (any float dtype) for fields [R, G] or [1, 1].

    damp, times the mean of H's diagonal, is added to that diagonal. Where H still cannot be factorized it is raised, to
    at least 0.001 and then tenfold; QATError if that does not help. fp64, or fp32 for more than 8192 columns. A column
    without input (H_jj = 0) is rounded to nearest. Raises QATError if H holds numbers that are not finite.
    """
    if not bool(torch.isfinite(hessian_KK).all()):
        raise QATError("the inputs of the calibration hold numbers that are not finite; look for NaN in the batches")
    columns = w_RK.shape[1]
    precision = wide(w_RK.device) if columns <= _LARGEST_FP64 else torch.float32
    diagonal = hessian_KK.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(columns)
    order = order.to(w_RK.device)
    hessian = hessian_KK.to(precision)[order][:, order]
    upper, damp = _inverse_factor(hessian, damp)
    # columns as rows of memory: each is read and updated whole
    rest = w_RK.float()[:, order].t().to(precision).contiguous()
    latents = torch.empty_like(rest, dtype=torch.float32)
    weights = torch.empty_like(latents)
    places = order.tolist()
    for first in range(0, columns, _LAZY):
        last = min(first + _LAZY, columns)
        errors = torch.empty_like(rest[first:last])
        for j in range(first, last):
            latents[j] = rest[j]
            weights[j] = hat(latents[j].unsqueeze(1), _of_column(fields, places[j], columns), spec).squeeze(1)
            error = errors[j - first]
            torch.sub(rest[j], weights[j], out=error).div_(upper[j, j])
            rest[j + 1 : last].addr_(upper[j, j + 1 : last], error, alpha=-1)
        rest[last:].addmm_(upper[first:last, last:].t(), errors, alpha=-1)
    back = torch.argsort(order)
    return Rounded(weights[back].t().contiguous(), latents[back].t().contiguous(), damp)


def _of_column(fields: Fields, column: int, columns: int) -> Fields:
    """Fields [R, 1] or [1, 1] of one column."""

    def of(field: Tensor) -> Tensor:
        group = column * field.shape[1] // columns
        return field[:, group : group + 1]

    return Fields(*(None if field is None else of(field) for field in fields))  # type: ignore[arg-type]


def _inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """(upper triangular U with (H + damping)^-1 = U^T U, the damping used)."""
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    # nothing couples a column without input to others: any positive number will do
    alive = torch.where(diagonal > 0, diagonal, mean or 1.0)
    identity = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    for attempt in range(_RAISES + 1):
        damped = hessian.clone()
        damped.diagonal().copy_(alive + damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            if bool(torch.isfinite(upper).all()):
                return upper, damp
        if attempt < _RAISES:
            damp = max(10 * damp, _SMALLEST_RAISE)
    raise QATError(f"the Hessian of the inputs cannot be factorized with damp={damp}; is it one of real inputs?")


def errors_of(difference_RK: Tensor, hessian_KK: Tensor) -> Tensor:
    """d H d^T of every row d of a difference of weights, [R] in the dtype of H."""
    difference = difference_RK.to(hessian_KK.dtype)
    return ((difference @ hessian_KK) * difference).sum(1)
