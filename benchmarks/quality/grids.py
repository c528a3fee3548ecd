"""B1 grids: the byte-level model on the grids of deployment formats, beside their own rounding.

Super-blocks are 256 numbers of a row, so the model is one block of width 256 (786 thousand quantized parameters).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from benchmarks.common import FLOAT
from benchmarks.quality import ptq
from benchmarks.quality.bytes_lm import NETWORK, ByteGPT, BytesLM
from benchmarks.quality.methods import GPTQ, OURS, Case, Method, Width
from benchmarks.schemes import TOKEN, Slot
from qat.recipes import Train


class WideLM(BytesLM):
    def __init__(self, seed: int, dry: bool = False, corpus: str = "stdlib") -> None:
        super().__init__(seed, dry, corpus)
        self.float_schedule = Train(lr=2e-3, max_steps=20 if dry else 1000, weight_decay=0.05)
        self.steps = 8 if dry else 100
        self.network = {**NETWORK, "head_dim": 64}

    def fresh(self) -> nn.Module:
        return ByteGPT(256, 1, 4, self.context)


def _group(size: int, **words: Any) -> Slot:
    return {"granularity": "group", "group_size": size, **words}


def _kquant(name: str, bits: int, size: int, minima: bool) -> Width:
    zero = {"zero_point": "float"} if minima else {"signed_scale": True}
    return Width(bits, slot=_group(size, scale=name.lower(), **zero), ggml=name)


_FP8: Slot = {**TOKEN, "grid": "e4m3"}
WIDTHS = {
    "W4A8": Width(4, input=TOKEN),
    # inputs of `down` come from a GELU: without a zero point nearly half of the codes would be lost there
    "W4A4": Width(4, input={**TOKEN, "bits": 4, "zero_point": "int", "quantizer": "minmax"}),
    "NF4": Width(4, slot=_group(64, grid="nf4", scale="bnb_nested")),
    "MXFP4": Width(4, slot=_group(32, grid="fp4", scale="e8m0")),
    "NVFP4": Width(4, slot=_group(16, grid="fp4", scale="nvfp4")),
    "FP8": Width(8, slot={"grid": "e4m3"}, input=_FP8),
    "Q4_0": Width(4, slot=_group(32, scale="fp16", signed_scale=True), ggml="Q4_0"),
    "Q4_K": _kquant("Q4_K", 4, 32, True),
    "Q3_K": _kquant("Q3_K", 3, 16, False),
    "Q2_K": _kquant("Q2_K", 2, 16, True),
}
_OWN = "the format's own"
_RTN = Method(slot={"quantizer": "mse"})
_GPTQ = Method(slot={"quantizer": "mse", "init": "gptq"})
_QAT = Method("kl", slot={"quantizer": "lsq", "init": "gptq latent"}, hidden=1.0)


def _rotated(method: Method) -> Method:
    return replace(method, fold={"method": "rotate"}, only=("W4A8", "W4A4"))


# trained on the common 4-bit grid, then rounded to the type by llama.cpp: what one has to do without its own grid
_Q4_0: Slot = {**WIDTHS["Q4_0"].slot, "bits": 4, "zero_point": "none"}
_SUPER = ("Q4_K", "Q3_K", "Q2_K")
_AGAIN = "qat on Q4_0, then llama.cpp"

METHODS = {
    FLOAT: Method(),
    "RTN": _RTN,
    "RTN, rotated": _rotated(_RTN),
    "llama.cpp, importance matrix": Method(ptq=ptq.llama_cpp, only=tuple(w for w, grid in WIDTHS.items() if grid.ggml)),
    "bitsandbytes": Method(ptq=ptq.bitsandbytes, only=("NF4",)),
    GPTQ: _GPTQ,
    "GPTQ, rotated": _rotated(_GPTQ),
    OURS: _QAT,
    "qat, rotated": _rotated(_QAT),
    _AGAIN: replace(_QAT, at=dict.fromkeys(_SUPER, _Q4_0), ptq=ptq.llama_cpp, only=_SUPER),
}
GRIDS = Case(
    WideLM,
    WIDTHS,
    METHODS,
    # its float model alone takes minutes
    ((), ()),
    {
        "kl / RTN": ("RTN",),
        f"kl / {_OWN}": ("llama.cpp, importance matrix", "bitsandbytes"),
        "kl / GPTQ": (GPTQ,),
        f"kl / {_AGAIN}": (_AGAIN,),
    },
    rates=(1e-4, 3e-4, 1e-3),
)
