"""Variants that are tried on the tuning split of one seed; what did not help goes to docs/experiments.md.

A variant is one line. One that recipes have no words for yet is reported with the reason.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.quality.methods import OURS, WIDTHS, Method

# of the 150 steps
_HALF_FROZEN = {"phases": {"learn": {"steps": 75}, "settle": {"freeze_scales": True}}}
_SIGNED = {"signed_scale": True}
_SEARCH = OURS.varied(init="search", at={"ternary": {"init": "search"}})
_LATENT = OURS.varied(init="gptq latent", at={"ternary": {"init": "gptq latent"}})

TRIALS: dict[str, Method] = {
    "default": OURS,
    "start: search": _SEARCH,
    "start: GPTQ latents": _LATENT,
    "start: GPTQ rounded": OURS.varied(init="gptq", at={"ternary": {"init": "gptq"}}),
    "frozen MSE scales": OURS.varied(quantizer="mse"),
    "dynamic absmax scales": _SEARCH.varied(quantizer="absmax"),
    "grid seq": _SEARCH.varied(at={"W2": {"grid": "seq"}}),
    "grid seq, GPTQ latents": OURS.varied(at={"W2": {"grid": "seq"}}),
    "signed scales": OURS.varied(at={"W4": _SIGNED, "W3": _SIGNED, "W2": _SIGNED}),
    "grid ternary": OURS.varied(at={"ternary": {"grid": "ternary", "init": "search"}}),
    "integer zero point": _SEARCH.varied(
        zero_point="int", at={width: {"narrow": False} for width in WIDTHS if width != "ternary"}
    ),
    "scale rate 0.1": replace(OURS, scale_rate=0.1),
    "scale rate 3": replace(OURS, scale_rate=3.0),
    "scales frozen in the second half": replace(OURS, recipe=_HALF_FROZEN),
    "cross entropy": replace(OURS, loss="ce"),
}
