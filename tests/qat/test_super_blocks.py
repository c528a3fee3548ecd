"""Fields that super-blocks store: by super-block never farther from the weight than what the groups would like.

Mutations tried, one at a time: acceptance by group, not by super-block; the wish's error taken before it is stored; no
fit of what is shared in the last rounds; the wrong sign of a minimum in it; one start: each turns a test red.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qat.layout import Layout
from qat.qtensor import Fields
from qat.quantizers import _super_blocks, make_quantizer, mse
from qat.quantizers._ranges import minmax_fields
from qat.quantizers._super_blocks import settled
from qat.scales import TwoLevel
from qat.specs import QuantSpec

MINIMA: dict[str, Any] = {"signed": False, "zero_point": "float"}
SPECS = {
    "q2_k": QuantSpec(2, granularity="group", group_size=16, scale="q2_k", quantizer="mse", **MINIMA),
    "q3_k": QuantSpec(3, granularity="group", group_size=16, scale="q3_k", quantizer="mse", signed_scale=True),
    "q4_k": QuantSpec(4, granularity="group", group_size=32, scale="q4_k", quantizer="mse", **MINIMA),
    "q5_k": QuantSpec(5, granularity="group", group_size=32, scale="q5_k", quantizer="mse", **MINIMA),
    "q6_k": QuantSpec(6, granularity="group", group_size=16, scale="q6_k", quantizer="mse"),
}
# of the error that the groups' wishes leave when they are stored, plain and weighted, measured for this weight
GAINS = {
    "q2_k": (0.9480, 0.9102),
    "q3_k": (0.9974, 0.9957),
    "q4_k": (0.9658, 0.9458),
    "q5_k": (0.9240, 0.8640),
    "q6_k": (0.9534, 0.9563),
}


def weight(seed: int, rows: int = 24) -> Tensor:
    w = torch.randn(rows, 512, generator=torch.Generator().manual_seed(seed))
    return w * w.abs().sqrt()


def importance(seed: int, like: Tensor) -> Tensor:
    return (torch.rand(like.shape[1], generator=torch.Generator().manual_seed(seed)) ** 3 * 5 + 0.01).expand(like.shape)


def errors(spec: QuantSpec, fields: Fields, w: Tensor, h: Tensor | None) -> Tensor:
    """Squared errors of super-blocks, by the weights that would be exported."""
    assert isinstance(spec.scale_grid, TwoLevel)
    scale, minimum = spec.scale_grid.stored(fields.scale, fields.minimum)
    off = (spec.grid.fake_quantize(w, scale, None, minimum).double() - w.double()).square()
    off = off if h is None else off * h
    return off.reshape(w.shape[0], -1, spec.scale_grid.run).sum(-1)


def wishes(spec: QuantSpec, w: Tensor, h: Tensor | None) -> Iterator[Fields]:
    """What the search says that knows nothing of super-blocks, and ranges."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mse, "settled", lambda w, spec, found, h: found[0])
        yield mse.search(w, spec, h)
    yield minmax_fields(w, spec)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_no_super_block_is_worse_than_a_wish(name: str, weighted: bool) -> None:
    spec = SPECS[name]
    for seed in range(6):
        w = weight(seed) * 10.0 ** (seed - 3)
        w[0], w[1, :256], w[2] = 0.0, -0.37, w[2].abs()
        h = importance(seed, w) if weighted else None
        given = list(wishes(spec, w, h))
        found = settled(w, spec, given, h)
        assert all(bool((errors(spec, found, w, h) <= errors(spec, wish, w, h)).all()) for wish in given)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_what_it_gains(name: str, weighted: bool, record_property: Any) -> None:
    spec, w = SPECS[name], weight(7)
    h = importance(7, w) if weighted else None
    wish = next(wishes(spec, w, h))
    quantizer = make_quantizer(spec, Layout(tuple(w.shape)))
    quantizer.init_from(w, h)
    after = errors(spec, quantizer.fields(w), w, h).sum()
    ratio = float(after / errors(spec, wish, w, h).sum())
    record_property("error over that of the wishes", ratio)
    assert ratio < GAINS[name][weighted] * 1.002


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, w = SPECS["q4_k"], weight(1)
    given = list(wishes(spec, w, None))
    whole = settled(w, spec, given, None)
    monkeypatch.setattr(_super_blocks, "_AT_ONCE", 1024)
    parts = settled(w, spec, given, None)
    assert torch.equal(whole.scale, parts.scale) and torch.equal(whole.minimum, parts.minimum)  # type: ignore[arg-type]
    assert settled(w[:0], spec, [Fields(given[0].scale[:0], None, given[0].minimum[:0])], None).scale.shape[0] == 0  # type: ignore[index]


def test_not_finite_weights_keep_finite_fields() -> None:
    spec, w = SPECS["q2_k"], weight(2, 4)
    w[0, 3], w[1, 300] = torch.nan, torch.inf
    found = mse.search(w, spec)
    assert bool(torch.isfinite(found.scale).all()) and bool((found.scale > 0).all())
    assert found.minimum is not None and bool(torch.isfinite(found.minimum).all())
