"""two_level's reference against ggml's and bitsandbytes' decoders and exllamav2's half arithmetic.

Mutations that were tried, and the test that turned red:

    m = d' * mn subtracted before the product is rounded        test_ggml_decodes_the_fake_quantized_numbers
    d left in fp32                                              test_ggml_decodes_the_fake_quantized_numbers
    sc's lower bound 1 -> 0                                     test_zero_blocks
    k^2 + k + 1/2 -> k^2 + k + 1                                test_exl2
    a_hat as table * N with the offset folded in before         test_double_quantization
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qat.fake_quant_kernels import codebook, two_level


def numbers(seed: int = 0, rows: int = 4, columns: int = 512) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=g) * torch.logspace(-3, 1, rows).unsqueeze(1) + 0.01


def halves(d: Tensor) -> Tensor:
    assert torch.equal(d.half().float(), d)
    return d.half().reshape(-1, 1).view(torch.uint8)


def block_q4_k(codes: Tensor, sc: Tensor, d: Tensor, mn: Tensor, d_min: Tensor) -> Tensor:
    u, sc, mn = codes.reshape(-1, 4, 2, 32), sc.reshape(-1, 8), mn.reshape(-1, 8)
    twelve = torch.cat(
        (
            sc[:, :4] | sc[:, 4:] >> 4 << 6,
            mn[:, :4] | mn[:, 4:] >> 4 << 6,
            (sc[:, 4:] & 15) | (mn[:, 4:] & 15) << 4,
        ),
        1,
    )
    return torch.cat((halves(d), halves(d_min), twelve, (u[:, :, 0] | u[:, :, 1] << 4).flatten(1)), 1)


def block_q2_k(codes: Tensor, sc: Tensor, d: Tensor, mn: Tensor, d_min: Tensor) -> Tensor:
    u = codes.reshape(-1, 2, 4, 32)
    qs = u[:, :, 0] | u[:, :, 1] << 2 | u[:, :, 2] << 4 | u[:, :, 3] << 6
    return torch.cat(((sc | mn << 4).reshape(-1, 16), qs.flatten(1), halves(d), halves(d_min)), 1)


def block_q6_k(codes: Tensor, sc: Tensor, d: Tensor, mn: Tensor, d_min: Tensor) -> Tensor:
    u = (codes + 32).to(torch.uint8).reshape(-1, 2, 4, 32)
    low = torch.cat(((u[:, :, 0] & 15) | (u[:, :, 2] & 15) << 4, (u[:, :, 1] & 15) | (u[:, :, 3] & 15) << 4), 2)
    high = u[:, :, 0] >> 4 | u[:, :, 1] >> 4 << 2 | u[:, :, 2] >> 4 << 4 | u[:, :, 3] >> 4 << 6
    return torch.cat((low.flatten(1), high.flatten(1), sc.reshape(-1, 16), halves(d)), 1)


BLOCKS = {"Q4_K": block_q4_k, "Q2_K": block_q2_k, "Q6_K": block_q6_k}


@pytest.mark.parametrize("name", BLOCKS)
def test_ggml_decodes_the_fake_quantized_numbers(name: str) -> None:
    """Mutation: another order of the subtraction, or scales that fp16 does not hold -> red."""
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    how = two_level.KQUANTS[name]
    for seed in range(10):
        w = numbers(seed)
        codes, *fields = two_level.kquant_dynamic(w, *how, True, torch.float32)
        block = BLOCKS[name](codes, *fields).numpy()
        theirs = torch.from_numpy(gguf.quants.dequantize(block, gguf.GGMLQuantizationType[name])).reshape(w.shape)
        fake, *again = two_level.kquant_dynamic(w, *how, False, torch.float32)
        assert torch.equal(theirs, fake)
        assert all(torch.equal(a, b) for a, b in zip(fields, again, strict=True))


@pytest.mark.parametrize("name", two_level.KQUANTS)
def test_numbers_are_those_of_affine_with_these_fields(name: str) -> None:
    """A learned scale goes through `super_scales` and then through `affine`: the same numbers as in one pass."""
    affine = pytest.importorskip("qat.fake_quant_kernels.affine")
    size, lo, hi, top, minima = two_level.KQUANTS[name]
    w = numbers(3)
    fake, sc, d, mn, d_min = two_level.kquant_dynamic(w, size, lo, hi, top, minima, False, torch.float32)
    s = two_level.super_values(sc, d)
    m = -two_level.super_values(mn, d_min) if minima else None
    assert torch.equal(fake, affine.fake_quantize(w, s, None, m, lo, hi))
    assert int(sc.min()) >= 1 and int(sc.max()) == top
    assert float((fake - w).abs().max()) < float(s.max()) * 1.6
    again, same_d = two_level.super_scales(s, two_level.SUPER // size, top)
    # d comes back from its own largest product, but for one unit of fp16 in the division by top
    assert float((two_level.super_values(again, same_d) / s - 1).abs().max()) < 2.0**-4


def test_zero_blocks() -> None:
    """Mutation: sc may be 0 -> 1 / s is infinite and 0 * infinity NaN."""
    for how in two_level.KQUANTS.values():
        w = numbers()
        w[0], w[1, :256], w[2, 16:48] = 0, 0, 0
        fake, sc, d, *_ = two_level.kquant_dynamic(w, *how, False, torch.float32)
        assert bool(fake.isfinite().all()) and not fake[0].any() and not fake[1, :256].any()
        assert bool((two_level.super_values(sc, d) > 0).all())


def test_exl2() -> None:
    """The nearest of the 16 numbers that exllamav2 decodes. Mutation: another midpoint -> red."""
    s0 = torch.rand(40, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 1e-2, 1e-3, 30.0, 2e-2, 5e-3]
    )
    largest = two_level.exl2_largest(s0)
    assert largest.shape == (1, 6) and torch.equal(largest, s0.amax(0, keepdim=True).half().float())
    k = two_level.exl2_encode(s0, largest)
    assert int(k.min()) == 1 and int(k.max()) == 16
    # qdq_util.cuh, dq_scale: half * half, of max * half(1 / 256)
    squares = (k.int() * k.int()).half()
    theirs = squares * (largest.half() * torch.tensor(1 / 256, dtype=torch.half))
    assert torch.equal(two_level.exl2_decode(k, largest), theirs.float())
    step = two_level.exl2_step(largest).double()
    every = torch.arange(1, 17).double() ** 2 * step.unsqueeze(-1)
    far = (s0.double().unsqueeze(-1) - every).abs()
    assert torch.equal(k.long() - 1, far.argmin(-1))


def test_double_quantization() -> None:
    """a_hat in the consumer's two roundings; all positive. Mutation: one rounding -> red."""
    table = two_level.dynamic_map()
    assert table.shape == (256,) and bool((table[1:] > table[:-1]).all()) and float(table[-1]) == 1.0
    for spread in (0.05, 1.0, 10.0):
        a = torch.exp(torch.randn(3, 300, generator=torch.Generator().manual_seed(0)) * spread)
        offset = a.mean().reshape(1)
        codes, largest = two_level.double_encode(a, offset, table)
        assert codes.shape == a.shape and largest.shape == (4,)
        decoded = two_level.double_decode(codes, largest, offset, table)
        runs = torch.arange(900).reshape(3, 300) // 256
        assert torch.equal(decoded, table[codes.long()] * largest[runs] + offset)
        assert bool((decoded > 0).all())
        v = (a - offset).reshape(-1)
        assert torch.equal(largest[:3], v[:768].reshape(3, 256).abs().amax(-1))
        far = ((v / largest[runs.reshape(-1)]).double().unsqueeze(-1) - table.double()).abs()
        chosen = far.gather(1, codes.reshape(-1, 1).long()).squeeze(1)
        nearest = chosen <= far.amin(-1) * (1 + 1e-5) + 1e-9
        assert bool(nearest.all()) or spread > 0.05


def test_bitsandbytes_decodes_the_same_scales() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    assert torch.equal(two_level.dynamic_map(), functional.create_dynamic_map())
    w = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    theirs, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    absmax = w.reshape(64, 16, 64).abs().amax(-1)
    codes, largest = two_level.double_encode(absmax, state.offset.reshape(1), state.state2.code)
    assert torch.equal(largest, state.state2.absmax)
    # its search on a CPU takes a neighbour now and then; never a nearer one
    v = (absmax.reshape(-1) - state.offset).double() / largest.repeat_interleave(256).double()
    ours, theirs8 = ((v - state.state2.code.double()[c.reshape(-1).long()]).abs() for c in (codes, state.absmax))
    assert bool((ours <= theirs8).all()) and float((codes.reshape(-1) != state.absmax).float().mean()) < 0.01
    state.absmax = codes.reshape(-1)
    a = two_level.double_decode(codes, largest, state.offset.reshape(1), state.state2.code)
    levels = torch.tensor(codebook.NF4)
    # bitsandbytes finds its codes with the scales before double quantization, we with those it decodes
    ours = codebook.encode(w, a, levels, False).reshape(-1)
    state_codes = torch.stack((theirs.reshape(-1) >> 4, theirs.reshape(-1) & 15), 1).reshape(-1)
    assert float((ours != state_codes).float().mean()) < 0.03
    packed = (ours[::2] << 4 | ours[1::2]).reshape(-1, 1)
    decoded = functional.dequantize_4bit(packed, state)
    assert torch.equal(decoded, codebook.fake(w, a, levels, torch.float32))


def test_opcheck_and_compile() -> None:
    w, s0 = numbers(rows=2), torch.rand(3, 4)
    m, table, offset = two_level.exl2_largest(s0), two_level.dynamic_map(), torch.tensor([0.5])
    k = two_level.exl2_encode(s0, m)
    codes, largest = two_level.double_encode(s0, offset, table)
    for op, args in (
        (two_level.kquant_dynamic, (w, *two_level.KQUANTS["Q4_K"], True, torch.float32)),
        (two_level.kquant_dynamic, (w, *two_level.KQUANTS["Q6_K"], False, torch.float32)),
        (two_level.exl2_encode, (s0, m)),
        (two_level.exl2_decode, (k, m)),
        (two_level.double_encode, (s0, offset, table)),
        (two_level.double_decode, (codes, largest, offset, table)),
    ):
        torch.library.opcheck(op.custom, args)
    args = (*two_level.KQUANTS["Q4_K"], False, torch.float32)
    compiled = torch.compile(lambda w: two_level.kquant_dynamic(w, *args), fullgraph=True)
    for found, wanted in zip(compiled(w), two_level.kquant_dynamic(w, *args), strict=True):
        assert torch.equal(found, wanted)
