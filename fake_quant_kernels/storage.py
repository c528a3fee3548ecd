"""How a scale or a minimum is stored, on plain tensors: `qat.scales` names the storages, this rounds to them.

    fp32, fp16, bf16     as they are
    float8_e8m0fnu       2^-127 .. 2^127, powers of two only (OCP Microscaling formats, v1.0, section 5.4.1)
    float8_e4m3fn        up to 448, normal from 2^-6 (OCP 8-bit floating point, revision 1.0)

Every storage rounds to its nearest number, ties to the even significand (e8m0, which has none: upwards), as torch's
casts do. For e8m0 that is neither of the exponent rules in use, floor(log2 amax) - emax and its ceiling: those find a
scale from a maximum, this stores a scale that was found already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.errors import QATError

# older versions of torch lack e8m0
_E8M0 = getattr(torch, "float8_e8m0fnu", None)
# how kernels name the storages (`device.project`)
_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, _E8M0: 3, torch.float8_e4m3fn: 4}


def storage_code(storage: torch.dtype) -> int:
    """The number by which kernels know a storage. Raises QATError for a dtype that stores no scales."""
    if storage not in _CODES:
        raise QATError(f"{storage} stores no scales; use one of {', '.join(str(each) for each in _CODES if each)}")
    return _CODES[storage]


def _stored(value: Tensor, storage: torch.dtype) -> Tensor:
    """Finite fp32 within the range of `storage` -> its nearest number as fp32.

    On bits where it is compiled: torch.compile drops a pair of casts there and back where it fuses, and the rounding
    with it (and a cast to e8m0 exists on few devices).
    """
    if storage == torch.float32:
        return value
    if storage in (torch.bfloat16, torch.float16) and not torch.compiler.is_compiling():
        return value.to(storage).float()
    bits = value.view(torch.int32)
    if storage == _E8M0:
        # half an octave up, then the exponent alone
        return ((bits + 0x400000) & 0x7F800000).view(torch.float32)
    drop = {torch.bfloat16: 16, torch.float16: 13, torch.float8_e4m3fn: 20}[storage]
    rounded = ((bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)) & -(1 << drop)).view(torch.float32)
    if storage == torch.bfloat16:
        return rounded
    # fp32 has more exponents: below the smallest normal number, numbers of the storage are equally far apart
    normal, apart = (2.0**-14, 2.0**-24) if storage == torch.float16 else (2.0**-6, 2.0**-9)
    return torch.where(value.abs() < normal, torch.round(value * (1.0 / apart)) * apart, rounded)


def through(value: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 of any sign and shape, within the range of fp16 or bf16 -> its nearest numbers as fp32; NaN stays NaN."""
    return _stored(value, dtype)


def project(scale: Tensor, storage: torch.dtype, smallest: float, largest: float, keep_nan: bool = False) -> Tensor:
    """fp32 scales of any shape -> the nearest numbers of `storage` within smallest..largest, as fp32.

    smallest is positive, both ends are numbers of `storage` and e8m0's largest is below 2^127. NaN becomes the largest,
    an infinity the end on its side: a stored scale is always finite and positive. keep_nan: NaN stays.
    """
    if keep_nan and storage.itemsize > 1 and not torch.compiler.is_compiling():
        return _stored(scale.clamp(smallest, largest), storage)
    stored = torch.nan_to_num(scale, nan=largest, posinf=largest, neginf=smallest)
    found = _stored(stored.clamp(smallest, largest), storage)
    return torch.where(torch.isnan(scale), scale, found) if keep_nan else found


def project_minimum(
    minimum: Tensor, storage: torch.dtype, smallest: float, largest: float, half: bool = False
) -> Tensor:
    """fp32 minima (any sign, zero included) -> the nearest storable numbers as fp32; NaN becomes 0.

    half: also a number of fp16, denormals included (a portable minimum). Raises QATError for e8m0, which has no sign.
    """
    if storage == _E8M0:
        raise QATError("e8m0 stores no minimum: it has neither a sign nor a zero; use a zero point or another storage")
    stored = torch.nan_to_num(minimum, nan=0.0, posinf=largest, neginf=-largest)
    stored = _stored(stored.clamp(-largest, largest), storage)
    if half:
        return _stored(stored, torch.float16)
    if storage == torch.float32:
        stored = torch.where(stored.abs() < smallest, torch.zeros_like(stored), stored)
    return stored
