"""Variants that are tried on the tuning split of one seed; what did not help goes to docs/experiments.md.

A variant is one line. One that recipes have no words for yet is reported with the reason.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.quality.methods import OURS, Method

# of the 150 steps
_HALF_FROZEN = {"phases": {"learn": {"steps": 75}, "settle": {"freeze_scales": True}}}

TRIALS: dict[str, Method] = {
    "default": OURS,
    "start: search": OURS.varied(init="search"),
    "start: GPTQ latents": OURS.varied(init="gptq latent"),
    "start: GPTQ rounded": OURS.varied(init="gptq"),
    "frozen MSE scales": OURS.varied(quantizer="mse"),
    "dynamic absmax scales": OURS.varied({"W4": {}, "W3": {}}, quantizer="absmax", init="search"),
    "integers at 2 bits": OURS.varied({"W2": {}}),
    "signed integers at 2 bits": OURS.varied({"W2": {"signed_scale": True}}),
    "positive scales": OURS.varied({"W4": {}, "W3": {}}),
    "without hidden states": replace(OURS, hidden=0.0),
    "hidden states alone": replace(OURS, hidden=1000.0),
    "scale rate 0.1": replace(OURS, scale_rate=0.1),
    "scale rate 3": replace(OURS, scale_rate=3.0),
    "scales frozen in the second half": replace(OURS, recipe=_HALF_FROZEN),
    "cross entropy": replace(OURS, loss="ce", hidden=0.0),
}
