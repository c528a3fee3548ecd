"""nvfp4's reference against the formulas in fp64, and against compressed-tensors' and ggml's own decoders.

Mutations that were tried, and the test that turned red:

    f / T as f * (1 / T)                            test_compressed_tensors_decodes_the_fake_quantized_numbers
    the bound 2^-9 of f left out                    test_small_blocks_keep_a_scale
    2688 -> 448 in tensor_scale                     test_scales
    dw without the clipping                         test_gradients
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qat.fake_quant_kernels import float8, nvfp4
from qat.fake_quant_kernels.elements import e2m1_numbers


def numbers(seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(6, 64, generator=g) * torch.logspace(-2, 1, 6).unsqueeze(1)


@pytest.mark.parametrize("over", [False, True])
def test_scales(over: bool) -> None:
    """The largest block's f is 448, each f within half a step of what it should be. Mutation: 2688 -> red."""
    w = numbers()
    tensor = nvfp4.tensor_scale(float8.amax(w), over)
    assert tensor.shape == (1, 1)
    _, scales = nvfp4.encode_dynamic(w, tensor, 4, over, False)
    assert scales.dtype == torch.float8_e4m3fn and float(scales.float().max()) == 448.0
    wanted = w.reshape(6, 4, 16).abs().amax(-1).double() / 6 * 2688 / float(w.abs().max())
    assert float(((scales.double() - wanted).abs() / wanted).max()) <= 1 / 16 + 1e-6
    s = nvfp4.values_of(scales, tensor, over)
    exact = scales.float() / tensor if over else scales.float() * tensor
    assert torch.equal(s, exact)
    for amax in (0.0, torch.nan, torch.inf, 1e-45):
        found = nvfp4.tensor_scale(torch.tensor([[amax]]), over)
        assert bool(found.isfinite()) and float(found) > 0


@pytest.mark.parametrize("over", [False, True])
def test_dynamic(over: bool) -> None:
    w = numbers()
    tensor = nvfp4.tensor_scale(float8.amax(w), over)
    codes, scales = nvfp4.encode_dynamic(w, tensor, 4, over, False)
    fake, again = nvfp4.fake_dynamic(w, tensor, 4, over, torch.float32)
    assert torch.equal(scales.float(), again.float())
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    s = nvfp4.values_of(scales, tensor, over).repeat_interleave(16, 1)
    v = (w * (1 / s)).clamp(-6, 6)
    u = torch.cat((grid, -grid))[codes.long()]
    nearest = (v.abs().double().unsqueeze(-1) - grid.double()).abs().amin(-1)
    assert torch.equal((v.double() - u.double()).abs(), nearest)
    assert torch.equal(fake, u * s)
    assert torch.equal(fake, nvfp4.fake(w, scales, tensor, over, torch.float32))
    packed = nvfp4.encode(w, scales, tensor, over, True)
    assert torch.equal(packed, codes[:, :32] | codes[:, 32:] << 4)
    assert torch.equal(fake, nvfp4.decode(packed, scales, tensor, over, torch.float32, True))


def test_small_blocks_keep_a_scale() -> None:
    """Blocks far below the tensor's largest number, and of zeros. Mutation: no bound -> s = 0 and NaN."""
    w = torch.zeros(1, 64)
    w[0, 0], w[0, 16] = 100.0, 1e-4
    tensor = nvfp4.tensor_scale(float8.amax(w), False)
    fake, scales = nvfp4.fake_dynamic(w, tensor, 4, False, torch.float32)
    assert scales.float().tolist() == [[448.0, 2.0**-9, 2.0**-9, 2.0**-9]]
    assert bool(fake.isfinite().all()) and not fake[0, 17:].any()


def test_compressed_tensors_decodes_the_fake_quantized_numbers() -> None:
    base = pytest.importorskip("compressed_tensors.compressors", reason="needs compressed-tensors").BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    arguments = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    for seed in range(20):
        w = numbers(seed)
        tensor = nvfp4.tensor_scale(float8.amax(w), True)
        codes, scales = nvfp4.encode_dynamic(w, tensor, 4, True, False)
        state = {
            "weight_packed": codes[:, ::2] | codes[:, 1::2] << 4,
            "weight_scale": scales,
            "weight_global_scale": tensor.reshape(1),
        }
        theirs = base.get_value_from_registry("nvfp4-pack-quantized").decompress(state, scheme)["weight"]
        assert torch.equal(theirs.float(), nvfp4.fake(w, scales, tensor, True, theirs.dtype).float())
        # the same function in fp32, where its division shows
        u = e2m1_numbers(codes)
        wide = dequantize(u, scales.float(), args=arguments, global_scale=tensor.reshape(1), dtype=torch.float32)
        assert torch.equal(wide, nvfp4.fake(w, scales, tensor, True, torch.float32))


def test_ggml_decodes_the_fake_quantized_numbers() -> None:
    """Its blocks are ours with the tensor's scale 1."""
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    w, one = numbers(), torch.ones(1)
    codes, scales = nvfp4.encode_dynamic(w, one, 4, False, False)
    groups = codes.reshape(6, 4, 16)
    halves = (groups[:, :, :8] | groups[:, :, 8:] << 4).reshape(6, 32)
    block = torch.cat((scales.view(torch.uint8), halves), 1).numpy()
    theirs = torch.from_numpy(gguf.quants.dequantize(block, gguf.GGMLQuantizationType.NVFP4)).reshape(6, 64)
    assert torch.equal(theirs, nvfp4.fake(w, scales, one, False, torch.float32))


@pytest.mark.parametrize("over", [False, True])
def test_gradients(over: bool) -> None:
    w, grad, tensor = numbers(), numbers(1), torch.tensor([0.37])
    _, scales = nvfp4.encode_dynamic(w, tensor, 4, over, False)
    scales = scales.flip(0)
    dw, ds = nvfp4.vjp(grad, w, scales, tensor, over, True, True)
    s = nvfp4.values_of(scales, tensor, over)
    leaf_w, leaf_s = w.double().requires_grad_(), s.double().requires_grad_()
    v = leaf_w.reshape(6, 4, 16) / leaf_s.unsqueeze(-1)
    u = nvfp4.fake(w, scales, tensor, over, torch.float32).reshape(v.shape).double() / s.double().unsqueeze(-1)
    out = (torch.where(v.abs() <= 6, v - v.detach(), 0.0) + u) * leaf_s.unsqueeze(-1)
    out.reshape(w.shape).backward(grad.double())
    assert torch.equal(dw, leaf_w.grad.float()) and bool((dw == 0).any())
    torch.testing.assert_close(ds.double(), leaf_s.grad, rtol=1e-4, atol=1e-3)


def test_opcheck_and_compile() -> None:
    w, tensor = numbers(), torch.tensor([0.01])
    codes, scales = nvfp4.encode_dynamic(w, tensor, 4, True, True)
    known = ("test_faketensor", "test_autograd_registration")
    for op, args in (
        (nvfp4.encode, (w, scales, tensor, True, True)),
        (nvfp4.decode, (codes, scales, tensor, False, torch.bfloat16, True)),
        (nvfp4.fake, (w, scales, tensor, True, torch.float32)),
        (nvfp4.encode_dynamic, (w, tensor, 4, False, True)),
        (nvfp4.fake_dynamic, (w, tensor, 4, True, torch.float32)),
        (nvfp4.vjp, (w, w, scales, tensor, True, True, True)),
    ):
        # test_schema compares arguments by arithmetic that PyTorch lacks for fp8
        fp8 = any(isinstance(a, Tensor) and a.dtype == torch.float8_e4m3fn for a in args)
        torch.library.opcheck(op.custom, args, test_utils=known if fp8 else (*known, "test_schema"))
    compiled = torch.compile(lambda w: nvfp4.fake_dynamic(w, tensor, 4, True, torch.float32), fullgraph=True)
    for found, wanted in zip(compiled(w), nvfp4.fake_dynamic(w, tensor, 4, True, torch.float32), strict=True):
        assert torch.equal(found.float(), wanted.float())
