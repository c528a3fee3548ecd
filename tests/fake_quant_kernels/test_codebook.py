"""codebook's reference against a loop over all distances in fp64, against ggml's and bitsandbytes' own decoders.

Mutations that were tried, and the test that turned red:

    bucketize(..., right=True): ties to the upper level     test_ties_go_to_the_lower_level
    midpoints (a + b) * 0.4                                 test_nearest_level
    a digit of NF4                                          test_tables_are_those_of_the_consumers
    `- v * inside` left out of ds                           test_gradients
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from qat.fake_quant_kernels import codebook

TABLES = {
    "nf4": codebook.NF4,
    "fp4": codebook.FP4,
    "bnb_fp4": codebook.BNB_FP4,
    "iq4_nl": codebook.IQ4_NL,
    "ternary": codebook.TERNARY,
    "seq2": codebook.SEQ2,
    "seq_ternary": codebook.SEQ_TERNARY,
}
# the comparisons of bitsandbytes' dQuantizeNF4 (csrc/kernels.cu), ascending
NF4_PIVOTS = (
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
    -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
    0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
)  # fmt: skip


def numbers(rows: int = 6, columns: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=g), 0.1 + torch.rand(rows, 3, generator=g)


@pytest.mark.parametrize("name", TABLES)
def test_nearest_level(name: str) -> None:
    """No level is nearer in fp64 than the one chosen. Mutation: another midpoint -> red."""
    levels, (w, s) = torch.tensor(TABLES[name]), numbers()
    w = w * float(levels.abs().max()) / 2
    codes = codebook.encode(w, s, levels, False)
    assert codes.dtype == torch.uint8 and codes.shape == w.shape
    v = (w.reshape(6, 3, 32) * (1.0 / s).unsqueeze(-1)).reshape(w.shape).double()
    far = (v.unsqueeze(-1) - levels.double()).abs()
    chosen = far.gather(-1, codes.long().unsqueeze(-1)).squeeze(-1)
    assert bool((chosen <= far.amin(-1) * (1 + 1e-6)).all())
    assert len(codes.unique()) == len(levels)
    number = levels[codes.long()].reshape(6, 3, 32) * s.unsqueeze(-1)
    assert torch.equal(codebook.decode(codes, s, levels, torch.float32, False), number.reshape(w.shape))
    assert torch.equal(codebook.fake(w, s, levels, torch.bfloat16), number.reshape(w.shape).bfloat16())
    packed = codebook.encode(w, s, levels, True)
    assert packed.shape == (6, 48)
    assert torch.equal(packed & 15, codes[:, :48]) and torch.equal(packed >> 4, codes[:, 48:])
    assert torch.equal(codebook.decode(packed, s, levels, torch.float32, True), number.reshape(w.shape))


@pytest.mark.parametrize("name", TABLES)
def test_ties_go_to_the_lower_level(name: str) -> None:
    levels = torch.tensor(TABLES[name])
    one, middle = torch.ones(1, 1), (levels[1:] + levels[:-1]) * 0.5
    count = len(levels) - 1
    for w, first in ((middle, 0), (torch.nextafter(middle, torch.tensor(torch.inf)), 1)):
        codes = codebook.encode(w.reshape(1, -1), one, levels, False)
        assert codes[0].tolist() == list(range(first, first + count))
    wide = torch.tensor([[-torch.inf, torch.inf, torch.nan]])
    assert codebook.encode(wide, one, levels, False).tolist() == [[0, count, count]]
    assert bool(codebook.fake(wide, one, levels, torch.float32)[0, 2].isnan())


def test_tables_are_those_of_the_consumers() -> None:
    """bitsandbytes' pivots are our midpoints; ggml's table is its Python package's; e2m1 is OCP's."""
    levels = torch.tensor(codebook.NF4)
    assert torch.equal((levels[1:] + levels[:-1]) * 0.5, torch.tensor(NF4_PIVOTS))
    assert codebook.FP4[7:] == (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    for table in TABLES.values():
        assert all(a < b for a, b in pairwise(table)) and 2 <= len(table) <= 16
    quants = pytest.importorskip("gguf.quants", reason="needs gguf")
    assert tuple(float(k) for k in quants.IQ4_NL.kvalues) == codebook.IQ4_NL


def test_ggml_decodes_iq4_nl_to_the_fake_quantized_numbers() -> None:
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    levels, (w, _) = torch.tensor(codebook.IQ4_NL), numbers(4, 64)
    codes, d = codebook.encode_dynamic(w, levels, 2, 1 / 113, torch.float16, 2.0**-14, 65504.0, False)
    groups = codes.reshape(8, 32)
    halves = d.half().reshape(8, 1).view(torch.uint8)
    block = torch.cat((halves, groups[:, :16] | groups[:, 16:] << 4), 1).numpy()
    theirs = torch.from_numpy(gguf.quants.dequantize(block, gguf.GGMLQuantizationType.IQ4_NL)).reshape(4, 64)
    assert torch.equal(theirs, codebook.fake(w, d, levels, torch.float32))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_encodes_and_decodes_the_same(kind: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    levels = torch.tensor(codebook.NF4 if kind == "nf4" else codebook.BNB_FP4)
    w, _ = numbers(8, 128, 3)
    codes, absmax = codebook.encode_dynamic(w, levels, 2, 1.0, torch.float32, 2.0**-110, 2.0**119, False)
    theirs, state = functional.quantize_4bit(w, blocksize=64, quant_type=kind, compress_statistics=False)
    assert torch.equal(state.absmax, absmax.reshape(-1))
    decoded = functional.dequantize_4bit(theirs, state)
    ours = codebook.decode(codes, absmax, levels, torch.float32, False)
    assert torch.equal(decoded, ours), f"{int((decoded != ours).sum())} of {ours.numel()} differ"


@pytest.mark.parametrize("scales", ["groups", "tensor"])
@pytest.mark.parametrize("name", ["nf4", "seq2"])
def test_gradients(name: str, scales: str) -> None:
    """LSQ's formula as autograd has it, in fp64. Mutation: ds without v -> red."""
    levels, (w, s) = torch.tensor(TABLES[name]), numbers()
    s = s if scales == "groups" else s[:1, :1]
    low, high = -0.99, 0.99
    g = torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    dw, ds = codebook.vjp(g, w, s, levels, low, high, True, True)
    leaf_w, leaf_s = w.double().requires_grad_(), s.double().requires_grad_()
    v = leaf_w.reshape(6, s.shape[1], -1) / leaf_s.unsqueeze(-1)
    u = levels.double()[codebook.encode(w, s, levels, False).long()].reshape(v.shape)
    inside = (v >= low) & (v <= high)
    # value u, derivative 1 with respect to v inside
    out = (torch.where(inside, v - v.detach(), 0.0) + u) * leaf_s.unsqueeze(-1)
    out.reshape(w.shape).backward(g.double())
    assert torch.equal(dw, leaf_w.grad.float())
    torch.testing.assert_close(ds.double(), leaf_s.grad, rtol=1e-5, atol=1e-5)
    assert codebook.vjp(g, w, s, levels, low, high, False, False)[0].numel() == 0
    assert codebook.vjp(g.bfloat16(), w, s, levels, low, high, True, False)[0].dtype == torch.bfloat16


def test_dynamic_scales_and_zero_groups() -> None:
    levels, (w, _) = torch.tensor(codebook.FP4), numbers()
    w[0, :32] = 0
    numbers_, s = codebook.fake_dynamic(w, levels, 3, 1 / 6, torch.float16, 2.0**-14, 65504.0, torch.float32)
    assert torch.equal(s, (w.reshape(6, 3, 32).abs().amax(-1) / 6).clamp(min=2.0**-14).half().float())
    assert torch.equal(numbers_, codebook.fake(w, s, levels, torch.float32))
    assert not numbers_[0, :32].any()


def test_opcheck_and_compile() -> None:
    levels, (w, s) = torch.tensor(codebook.NF4), numbers()
    codes = codebook.encode(w, s, levels, True)
    dynamic = (w, levels, 3, 1.0, torch.float32, 2.0**-110, 2.0**119)
    for op, args in (
        (codebook.encode, (w, s, levels, True)),
        (codebook.decode, (codes, s, levels, torch.bfloat16, True)),
        (codebook.fake, (w, s, levels, torch.float16)),
        (codebook.encode_dynamic, (*dynamic, True)),
        (codebook.fake_dynamic, (*dynamic, torch.float32)),
        (codebook.vjp, (w, w, s, levels, -1.0, 1.0, True, True)),
    ):
        torch.library.opcheck(op.custom, args)
    compiled = torch.compile(lambda w: codebook.fake_dynamic(w, *dynamic[1:], torch.float32), fullgraph=True)
    for found, wanted in zip(compiled(w), codebook.fake_dynamic(*dynamic, torch.float32), strict=True):
        assert torch.equal(found, wanted)
