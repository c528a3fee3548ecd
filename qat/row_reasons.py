"""Why a layer cannot get what a plan gives it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from qat.attention import attention_reasons
from qat.fake_quant_kernels.int8_linear import LONGEST
from qat.layers import layer_type
from qat.layout import Layout
from qat.quantizers import quantizer_class

if TYPE_CHECKING:
    from qat.plan import PlanRow

NOT_PLAIN = "its weight is no plain parameter (parametrized, weight-normed or lazy)"


def row_reasons(row: PlanRow, module: nn.Module, parents: dict[int, nn.Module]) -> list[str]:
    """Empty means it can; `parents`: id of a module -> the module around it."""
    found: list[str] = []
    entry = layer_type(module)
    if row.cache is None and not row.kinds:
        return [f"{NOT_PLAIN}; make it one, or keep this layer with keep_float: true"]
    if "forward" in module.__dict__:
        found.append(
            "its forward was replaced on the instance (module.forward = ...), which would hide the quantized one; "
            "remove that, or keep this layer with keep_float: true"
        )
    if row.cache is not None:
        return [*found, *attention_reasons(row.cache, module)]
    assert entry is not None
    if row.weight is not None:
        found += quantizer_class(row.weight.quantizer).reasons(row.weight)
        for key, kind in row.kinds.items():
            found += row.weight.shape_reasons(Layout(tuple(module._parameters[key].shape), kind).rows_shape[1])  # type: ignore[union-attr]
    if row.input is not None:
        found += quantizer_class(row.input.quantizer).reasons(row.input, activation=True)
        if row.input.granularity == "group":
            found += row.input.shape_reasons(row.columns)
        if row.input.granularity != "tensor" and entry[0].startswith("Conv") and entry[0] != "Conv1D":
            found.append(f"the input of {entry[0]} has no tokens; use granularity=tensor")
    if row.output is not None:
        found += quantizer_class(row.output.quantizer).reasons(row.output, activation=True)
        if entry[0] not in ("Linear", "Conv1D"):
            found.append(f"output is for Linear and Conv1D, not {entry[0]}; take it out of this rule")
        elif row.output.granularity == "group":
            outputs = Layout(tuple(module._parameters["weight"].shape), row.kinds["weight"]).rows_shape[0]  # type: ignore[union-attr]
            found += [f"output: {why}" for why in row.output.shape_reasons(outputs)]
    if row.backward != "float":
        found += _backward_reasons(row, entry[0], module)
    found += entry[1].reasons(module)
    parent = parents.get(id(module))
    if isinstance(parent, nn.MultiheadAttention):
        found.append(
            "torch.nn.MultiheadAttention reads this weight itself and would bypass the quantizer; "
            f"keep it with a rule {{match: ['{row.name}'], keep_float: true}}"
        )
    return found


def _backward_reasons(row: PlanRow, kind: str, module: nn.Module) -> list[str]:
    """Why the gradients of this layer cannot be multiplied as 8-bit integers: their scales lie on the summed axis, so
    there may be one per output channel and one per token."""
    said = f"backward={row.backward}"
    if kind != "Linear":
        return [f"{said} is for Linear, not {kind}; use backward=float"]
    found = []
    w, x = row.weight, row.input
    if w is None or not w.is_int or not w.signed or w.zero_point != "none" or w.granularity == "group":
        found.append(
            f"{said} needs a signed integer weight without zero points, granularity=channel or tensor; "
            f"this one is {w or 'float'}"
        )
    if row.backward == "int8" and (x is None or not x.is_int or x.granularity == "group" or x.zero_point == "float"):
        found.append(
            f"{said} needs an integer input per token or tensor, zero_point none or int; this one is {x or 'float'}; "
            "use int8_dgrad"
        )
    outputs = module._parameters["weight"].shape[0]  # type: ignore[union-attr]
    if outputs > LONGEST:
        found.append(
            f"{said} adds up at most {LONGEST} products in 32 bits, and this layer has {outputs} outputs; use "
            "backward=float for it"
        )
    return found
