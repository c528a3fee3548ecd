"""The gradients of `int8_linear` from 8-bit codes as well: optional, for GPUs whose integer matmul is the faster one.

With g = dL/dy [T, O], SR the stochastic rounding of rows (`stochastic_int8`) and s_g its scales:

    dx = g w_hat    ~  SR(g * w_scale) w_codes             w_scale lies on the contracted axis, so it goes into g
    dw = g^T x_hat  ~  SR(g^T * x_scale) (x_codes - z)     and so does x_scale

Both products are exact sums of codes (`int8_linear.accumulate`) times s_g, hence linear in the rounded g: as
E[SR(v)] = v, they are unbiased. Their variance is that of the rounding alone, for one number at most

    Var(dx[t, k]) <= 1/4 s_g[t]^2 sum_o w_codes[o, k]^2,      s_g[t] = max_o |g[t, o] w_scale[o]| / 127

Source: Banner, Hubara, Hoffer, Soudry 2018, "Scalable methods for 8-bit training of neural networks", section 4
(gradients need an unbiased rounding); there dw stays in 16 bits, which `int8_dgrad` alone gives.

On a CPU this does not pay: Philox in plain torch takes longer there than the matmul that it saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.fake_quant_kernels.int8_linear import LONGEST, op, signed
from qat.fake_quant_kernels.stochastic_int8 import stochastic_int8


def int8_dgrad(g: Tensor, w_codes: Tensor, w_scale: Tensor, seed: Tensor | int, dtype: torch.dtype) -> Tensor:
    """dx [T, K] of `dtype`, in expectation g [T, O] times w_codes * w_scale [O, K].

    w_codes int8; w_scale [O, 1] or [1, 1] fp32; seed as for `stochastic_int8`, another for each call. Raises QATError
    for O beyond 131071.
    """
    codes, scale = stochastic_int8(g, seed, w_scale.t())
    return op(codes, scale, w_codes.t(), scale.new_ones((1, 1)), None, dtype, None)  # type: ignore[no-any-return]


def int8_wgrad(
    g: Tensor, x_codes: Tensor, x_scale: Tensor, seed: Tensor | int, dtype: torch.dtype, x_zero: Tensor | None = None
) -> Tensor:
    """dw [O, K] of `dtype`, in expectation g [T, O] transposed times (x_codes - x_zero) * x_scale [T, K].

    x_codes int8 or uint8; x_scale, x_zero [T, 1] or [1, 1] fp32; seed as for `stochastic_int8`. Of more than 131071
    tokens pieces are rounded on their own and added up in fp32.
    """
    if g.shape[0] > LONGEST:
        dw = g.new_zeros((g.shape[1], x_codes.shape[1]), dtype=torch.float32)
        for number, at in enumerate(range(0, g.shape[0], LONGEST)):
            piece = slice(at, at + LONGEST)
            s, z = (t if t is None or t.shape[0] == 1 else t[piece] for t in (x_scale, x_zero))
            assert s is not None
            dw += int8_wgrad(g[piece], x_codes[piece], s, seed + number, torch.float32, z)
        return dw.to(dtype)
    x_codes, x_zero = signed(x_codes, x_scale, x_zero)
    codes, scale = stochastic_int8(g.t(), seed, x_scale.t())
    one = scale.new_ones((1, 1))
    if x_zero is None:
        return op(codes, scale, x_codes.t(), one, None, dtype, None)  # type: ignore[no-any-return]
    # sum_t code[o, t] * z[t] is the same for every k: one number per row, taken off in fp32
    dw = op(codes, scale, x_codes.t(), one, None, torch.float32, None)
    offset = (codes.to(torch.float32) * x_zero.t()).sum(1, keepdim=True) * scale
    return (dw - offset).to(dtype)  # type: ignore[no-any-return]
