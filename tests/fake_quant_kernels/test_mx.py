"""mx's reference against OCP MX v1.0 section 6.3 in fp64, and against the decoders of ggml and compressed-tensors.

Mutations that were tried, and the test that turned red:

    LEAD["e2m1"] 2 -> 1                         test_shared_exponents
    byte 0 as 2^-126                            test_shared_exponents
    half to even -> half away                   test_every_number_and_midpoint
    numbers above 6 not clamped                 test_every_number_and_midpoint
"""

from __future__ import annotations

import math

import pytest
import torch

from qat.fake_quant_kernels import mx

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@pytest.mark.parametrize("element", mx.ELEMENTS)
def test_shared_exponents(element: str) -> None:
    """floor(log2 amax) - emax, exactly, at powers of two and beside them. Mutation: another emax -> red."""
    top = mx.ELEMENTS[element].top
    for power in (*range(-149, 128, 9), -127, -126, -125, -100, 0, 1, 126, 127):
        for amax in (2.0**power, 2.0**power * (2 - 2.0**-23)):
            if amax > 3.5e38:
                continue
            exact = float(torch.tensor(amax))
            byte = int(mx.exponents_of(torch.tensor([exact]), element))
            wanted = math.frexp(exact)[1] - 1 - (math.frexp(top)[1] - 1) + 127
            assert byte == min(254, max(0, wanted if exact >= 2.0**-126 else 0)), (element, power)
    odd = mx.exponents_of(torch.tensor([0.0, torch.inf, torch.nan]), element)
    assert odd.tolist() == [0, 255, 255]
    every = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(mx.powers_of(every).double(), torch.pow(2.0, every.double() - 127))
    assert bool(mx.powers_of(torch.tensor([255], dtype=torch.uint8)).isnan())


def test_every_number_and_midpoint() -> None:
    """e2m1, half to even, both signs, saturating. Mutation: half away from zero -> red."""
    one = torch.full((1, 1), 127, dtype=torch.uint8)
    middle = (E2M1[1:] + E2M1[:-1]) / 2
    even = [0, 2, 2, 4, 4, 6, 6]
    for sign in (1, -1):
        offset = 0 if sign > 0 else 8
        for w, codes in (
            (E2M1, list(range(8))),
            (middle, even),
            (torch.nextafter(middle, torch.tensor(9.0)), list(range(1, 8))),
            (torch.nextafter(middle, torch.tensor(-9.0)), list(range(7))),
            (torch.tensor([6.01, 7.9, 1e9, torch.inf]), [7] * 4),
        ):
            found = mx.encode((w * sign).unsqueeze(0), one, "e2m1", False)
            assert (found[0] & 7).tolist() == codes and set(found[0].tolist()) <= {c + offset for c in codes}
    every = torch.arange(16, dtype=torch.uint8).unsqueeze(0)
    assert torch.equal(mx.decode(every, one, "e2m1", torch.float32, False), torch.cat((E2M1, -E2M1)).unsqueeze(0))
    nan = torch.tensor([[torch.nan, -torch.nan]])
    assert mx.encode(nan, one, "e2m1", False).tolist() == [[0, 0]]
    assert bool(mx.fake(nan, one, "e2m1", torch.float32).isnan().all())


@pytest.mark.parametrize("element", mx.ELEMENTS)
def test_dynamic(element: str) -> None:
    w = torch.randn(6, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 6).unsqueeze(1)
    w[2, :32] = 0
    codes, exponents = mx.encode_dynamic(w, 3, element, False)
    numbers, again = mx.fake_dynamic(w, 3, element, torch.float32)
    assert torch.equal(exponents, again) and exponents.dtype == torch.uint8
    assert torch.equal(numbers, mx.decode(codes, exponents, element, torch.float32, False))
    assert torch.equal(numbers, mx.fake(w, exponents, element, torch.float32))
    step = {"e2m1": 0.26, "e4m3": 0.13, "e5m2": 0.13}[element]
    assert (
        float(((numbers - w).abs() / w.reshape(6, 3, 32).abs().amax(-1).repeat_interleave(32, 1)).nan_to_num().max())
        < step
    )
    if element == "e2m1":
        packed, _ = mx.encode_dynamic(w, 3, element, True)
        assert torch.equal(packed, codes[:, :48] | codes[:, 48:] << 4)
        assert torch.equal(numbers, mx.decode(packed, exponents, element, torch.float32, True))


def test_infinite_block_is_nan() -> None:
    w = torch.ones(1, 64)
    w[0, 3] = torch.inf
    numbers, exponents = mx.fake_dynamic(w, 2, "e4m3", torch.float32)
    assert exponents.tolist() == [[255, 119]]
    assert bool(numbers[0, :32].isnan().all()) and torch.equal(numbers[0, 32:], w[0, 32:])


def test_ggml_decodes_mxfp4_to_the_fake_quantized_numbers() -> None:
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-36, 3, 4).unsqueeze(1)
    codes, exponents = mx.encode_dynamic(w, 2, "e2m1", False)
    groups = codes.reshape(8, 32)
    block = torch.cat((exponents.reshape(8, 1), groups[:, :16] | groups[:, 16:] << 4), 1).numpy()
    theirs = torch.from_numpy(gguf.quants.dequantize(block, gguf.GGMLQuantizationType.MXFP4)).reshape(4, 64)
    assert torch.equal(theirs, mx.fake(w, exponents, "e2m1", torch.float32))


def test_compressed_tensors_decodes_mxfp4_to_the_fake_quantized_numbers() -> None:
    base = pytest.importorskip("compressed_tensors.compressors", reason="needs compressed-tensors").BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8")
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    codes, exponents = mx.encode_dynamic(w, 2, "e2m1", False)
    state = {"weight_packed": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": exponents}
    theirs = base.get_value_from_registry("mxfp4-pack-quantized").decompress(state, scheme)["weight"]
    assert torch.equal(theirs.float(), mx.fake(w, exponents, "e2m1", theirs.dtype).float())


@pytest.mark.parametrize("element", mx.ELEMENTS)
def test_gradients(element: str) -> None:
    g = torch.Generator().manual_seed(2)
    w, grad = torch.randn(4, 64, generator=g), torch.randn(4, 64, generator=g)
    exponents = mx.exponents_of(torch.rand(4, 2, generator=g), element)
    dw, ds = mx.vjp(grad, w, exponents, element, True, True)
    leaf_w, leaf_s = w.double().requires_grad_(), mx.powers_of(exponents).double().requires_grad_()
    v = leaf_w.reshape(4, 2, 32) / leaf_s.unsqueeze(-1)
    u = (
        mx.fake(w, exponents, element, torch.float32).reshape(v.shape) / mx.powers_of(exponents).unsqueeze(-1)
    ).double()
    out = (torch.where(v.abs() <= mx.ELEMENTS[element].top, v - v.detach(), 0.0) + u) * leaf_s.unsqueeze(-1)
    out.reshape(w.shape).backward(grad.double())
    assert torch.equal(dw, leaf_w.grad.float()) and bool((dw == 0).any())
    torch.testing.assert_close(ds.double(), leaf_s.grad, rtol=1e-5, atol=1e-3)


def test_opcheck_and_compile() -> None:
    w = torch.randn(4, 64)
    codes, e = mx.encode_dynamic(w, 2, "e2m1", True)
    for op, args in (
        (mx.encode, (w, e, "e2m1", True)),
        (mx.encode, (w, e, "e4m3", False)),
        (mx.decode, (codes, e, "e2m1", torch.bfloat16, True)),
        (mx.fake, (w, e, "e5m2", torch.float32)),
        (mx.encode_dynamic, (w, 2, "e2m1", True)),
        (mx.fake_dynamic, (w, 2, "e4m3", torch.float32)),
        (mx.vjp, (w, w, e, "e2m1", True, True)),
    ):
        torch.library.opcheck(op.custom, args)
    compiled = torch.compile(lambda w: mx.fake_dynamic(w, 2, "e2m1", torch.float32), fullgraph=True)
    for found, wanted in zip(compiled(w), mx.fake_dynamic(w, 2, "e2m1", torch.float32), strict=True):
        assert torch.equal(found, wanted)
