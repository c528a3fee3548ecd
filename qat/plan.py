"""`Plan`: a recipe resolved on one model, before anything is changed."""

from __future__ import annotations

import difflib
import io
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from qat.adapters import Adapters, is_peft_model
from qat.attention import attention_op, no_attention
from qat.errors import QATError
from qat.layers import TYPES, layer_type, listed_name, original_class
from qat.layout import Layout
from qat.norm_pairs import find_pairs
from qat.quantizers import Quantizer
from qat.recipes.schema import Recipe, Rule, Slot
from qat.row_reasons import NOT_PLAIN, row_reasons
from qat.specs import QuantSpec

_RECURRENT = ("LSTM", "GRU", "RNN")
_LISTED_REASONS = 4


@dataclass(frozen=True)
class PlanRow:
    """One layer. `weight`/`input`/`output` None: that slot stays in float. `kinds`: weight name -> layout kind."""

    name: str
    type: str
    rule: str | None
    weight: QuantSpec | None
    input: QuantSpec | None
    params: int
    kinds: dict[str, str] = field(default_factory=dict)
    columns: int = 0
    listed: bool = False
    note: str = ""
    # the rule that gave the weight its spec (`rule` is the last one that matched): bits of a phase go by it
    weight_rule: str | None = None
    # float | int8 | int8_dgrad: how the matmuls of its gradients run
    backward: str = "float"
    # of what the layer gives
    output: QuantSpec | None = None
    # the batch norm that is multiplied into its weight
    norm: str = ""
    # of attention: its keys and values, each with fields of its own
    cache: QuantSpec | None = None

    @property
    def quantized(self) -> bool:
        return any(spec is not None for spec in (self.weight, self.input, self.output, self.cache))

    @property
    def activations(self) -> str:
        """Its input, and what else it rounds besides weights."""
        x = str(self.input or "float") + ("" if self.backward == "float" else f", backward {self.backward}")
        x += "" if self.output is None else f", output {self.output}"
        return x + ("" if self.cache is None else f", cache {self.cache}")


@dataclass(frozen=True)
class Plan:
    """Every layer that could be quantized, what becomes of it, and the model's totals."""

    recipe: str
    rows: list[PlanRow]
    float_rows: list[PlanRow]
    total_params: int
    float_bytes: int

    @property
    def coverage(self) -> float:
        """Parameters on a quantized grid, in % of all parameters."""
        covered = sum(row.params for row in self.rows if row.weight is not None)
        return 100.0 * covered / self.total_params if self.total_params else 0.0

    @property
    def bytes(self) -> int:
        """Expected size of the packed parameters: codes, scales and zero points, plus what stays in float."""
        packed = sum(row.params * row.weight.bits_per_weight(row.columns) / 8 for row in self.rows if row.weight)
        return round(packed) + self.float_bytes

    @property
    def summary(self) -> str:
        """One line: coverage, layers, size."""
        return (
            f"{self.coverage:.2f} % of {self.total_params:,} parameters on a grid; "
            f"{len(self.rows)} layers quantized, {len(self.float_rows)} left in float; "
            f"expected size {self.bytes:,} bytes (tensors, without header and tokenizer)"
        )

    def render(self) -> str:
        """A table: layer, type, rule, specs, parameters; then coverage and size."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"plan of {self.recipe}", title_justify="left")
        for column in ("layer", "type", "rule", "weight", "input"):
            table.add_column(column, overflow="fold")
        table.add_column("parameters", justify="right")
        for row in (*self.rows, *self.float_rows):
            weight = str(row.weight) if row.weight else f"float{f' ({row.note})' if row.note else ''}"
            weight += f", with {row.norm}" if row.norm else ""
            cells = (row.name or "(the model)", row.type, row.rule or "-", weight, row.activations)
            table.add_row(*cells, f"{row.params:,}")
        console = Console(width=160, record=True, file=io.StringIO())
        console.print(table)
        console.print(self.summary)
        return console.export_text()


def spec_of(slot: Slot) -> QuantSpec:
    """A recipe's slot as a QuantSpec."""
    return QuantSpec(**slot.spec_fields())


def matches(rule: Rule, names: tuple[str, ...], types: tuple[str, ...]) -> bool:
    """Whether the rule's patterns hit a module that has one of these names and types."""
    if rule.types and not set(rule.types) & set(types):
        return False
    return any(
        re.fullmatch(pattern[3:], name) is not None if pattern.startswith("re:") else fnmatchcase(name, pattern)
        for pattern in rule.match
        for name in names
    )


def has_config(module: nn.Module) -> bool:
    """Whether a module is a Hugging Face model."""
    return hasattr(getattr(module, "config", None), "model_type")


def deployed(model: nn.Module) -> tuple[str, nn.Module]:
    """(prefix, module): the outermost module with a Hugging Face config, peft's own apart, else the model itself."""
    for name, module in model.named_modules():
        if has_config(module) and not is_peft_model(module):
            return (f"{name}." if name else ""), module
    return "", model


def make_plan(model: nn.Module, recipe: Recipe) -> Plan:
    """Resolve `recipe` on `model`; changes nothing.

    Raises QATError: a rule that matches nothing (unless optional), a spec that a layer cannot hold, a module that would
    bypass its own forward, tied weights under different rules, or (recipe.strict) a layer left in float unlisted.
    """
    prefix, _ = deployed(model)
    adapters = Adapters(model)
    parents = {id(child): module for module in model.modules() for child in module.children()}
    rows: list[PlanRow] = []
    problems: list[str] = []
    used: Counter[str] = Counter()
    caches = any(rule.cache is not None for rule in recipe.rules.values())
    for name, rule in recipe.rules.items():
        for asked in rule.types:
            if asked not in TYPES and not rule.keep_float:
                problems.append(f"rules.{name}.types: {asked!r} {_no_type(asked)}")
    for name, module in model.named_modules():
        # a rule may name a layer as the whole module does or as the model inside it, so that a recipe means the same
        # for a bare model and for the LightningModule that trains it
        if id(module) in adapters.inner:
            continue
        names = (name, name.removeprefix(prefix))
        names = (*names, *map(adapters.name, names))
        attention = caches and attention_op(module) is not None
        row = _attention(names, module, recipe, used) if attention else _resolve(names, module, recipe, used)
        if row is None:
            continue
        if row.quantized:
            problems += [f"{name or 'the model'} (rule {row.rule}): {why}" for why in row_reasons(row, module, parents)]
        rows.append(row)
    for name, rule in recipe.rules.items():
        if not used[name] and not rule.optional and (rule.keep_float or _for_layers(rule)):
            problems.append(_unmatched(name, rule, rows))
        if rule.cache is not None and not used[f"{name}.cache"] and not rule.optional:
            problems.append(no_attention(name, [original_class(module).__name__ for module in model.modules()]))
    problems += _tied_reasons(model, rows, recipe, adapters)
    problems += adapters.reasons({row.name for row in rows if row.weight is not None})
    if recipe.batch_norm.fold:
        pairs, why = find_pairs(model, rows, recipe.batch_norm.pairs, prefix, set(adapters.of))
        rows = [replace(row, norm=pairs.get(row.name, "")) for row in rows]
        problems += why
    quantized = [row for row in rows if row.quantized]
    left = [row for row in rows if not row.quantized]
    if recipe.strict:
        unlisted = [row.name for row in left if not row.listed]
        if unlisted:
            problems.append(
                f"strict: {len(unlisted)} layers stay in float without being listed ({_some(unlisted)}); "
                "give them a rule, or list them with keep_float: true"
            )
    if not quantized and not problems:
        kinds = Counter(row.type for row in left if row.kinds)
        present = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none"
        problems.append(
            "no rule quantizes any layer of this model; check rules.*.match and rules.*.types "
            f"(layers that could be quantized: {present})"
        )
    if problems:
        raise QATError(f"recipe {recipe.name!r} does not fit {type(model).__name__}: {_some(problems, '; ')}")
    return _totals(model, recipe, quantized, left, adapters.parameters)


def _resolve(names: tuple[str, ...], module: nn.Module, recipe: Recipe, used: Counter[str]) -> PlanRow | None:
    """The row of one module, or None if it is not a layer that rules speak of."""
    entry = layer_type(module)
    near = listed_name(module)
    if entry is None and near is None and not _has_matrix(module):
        return None
    kind = entry[0] if entry else (near or "")
    why = "its forward is its own" if near else "no layer that can be quantized"
    row = PlanRow(names[0], original_class(module).__name__, None, None, None, 0, listed=False)
    for rule_name, rule in recipe.rules.items():
        speaks = rule.keep_float or _for_layers(rule)
        if not speaks or not matches(rule, names, (kind, original_class(module).__name__)):
            continue
        used[rule_name] += 1
        if rule.keep_float:
            kept = replace(row, weight=None, weight_rule=None, input=None, output=None, backward="float")
            row = replace(kept, rule=rule_name, listed=True)
        elif entry is None:
            row = replace(row, rule=rule_name)
        else:
            if rule.weight is not None:
                row = replace(row, weight=spec_of(rule.weight), weight_rule=rule_name)
            x = spec_of(rule.input) if rule.input is not None and kind != "Embedding" else row.input
            y = spec_of(rule.output) if rule.output is not None else row.output
            # a rule about gradients alone leaves a listed layer listed
            listed = row.listed and rule.weight is None and rule.input is None and rule.output is None
            backward = rule.backward or row.backward
            row = replace(row, rule=rule_name, input=x, output=y, backward=backward, listed=listed)
    if not row.quantized:
        row = replace(row, backward="float")
    if entry is None:
        return replace(row, params=_numbers(module), note=why)
    kinds = entry[1].kinds(module)
    if not all(_is_plain(module._parameters.get(key)) for key in kinds):
        return replace(row, params=_numbers(module), note=NOT_PLAIN)
    shapes = {key: module._parameters[key].shape for key in kinds}  # type: ignore[union-attr]
    columns = min(Layout(tuple(shape), kinds[key]).rows_shape[1] for key, shape in shapes.items())
    return replace(row, params=sum(shape.numel() for shape in shapes.values()), kinds=kinds, columns=columns)


def _for_layers(rule: Rule) -> bool:
    """Whether a rule gives anything to modules that are no attention."""
    return any(given is not None for given in (rule.weight, rule.input, rule.output, rule.backward))


def _attention(names: tuple[str, ...], module: nn.Module, recipe: Recipe, used: Counter[str]) -> PlanRow:
    """The row of attention with a cache."""
    row = PlanRow(names[0], original_class(module).__name__, None, None, None, 0)
    for rule_name, rule in recipe.rules.items():
        if not matches(rule, names, ("Attention", row.type)):
            continue
        if rule.keep_float:
            used[rule_name] += 1
            row = replace(row, rule=rule_name, cache=None, listed=True)
        elif rule.cache is not None:
            used[f"{rule_name}.cache"] += 1
            row = replace(row, rule=rule_name, cache=spec_of(rule.cache), listed=False)
    return row


def _is_plain(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and not isinstance(parameter, UninitializedParameter)


def _numbers(module: nn.Module) -> int:
    """How many numbers its own parameters and their parametrizations hold."""
    inner = module._modules.get("parametrizations")
    own = [*module._parameters.values(), *(inner.parameters() if inner is not None else ())]
    return sum(p.numel() for p in own if p is not None and _is_plain(p))


def _has_matrix(module: nn.Module) -> bool:
    """Whether a module of another class keeps weights of its own (LSTM, MultiheadAttention, bare parameters)."""
    return not isinstance(module, Quantizer | ParametrizationList) and any(
        _is_plain(p) and p.dim() > 1  # type: ignore[union-attr]
        for p in module._parameters.values()
    )


def _no_type(asked: str) -> str:
    if asked in _RECURRENT:
        return "cannot be quantized: its forward hands flat weights to a fused kernel that no quantizer can reach"
    if asked == "MultiheadAttention":
        return "cannot be quantized: it reads its weights itself; quantize an attention made of Linear layers"
    near = difflib.get_close_matches(asked, TYPES, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"is not a type that can be quantized{hint} (known: {', '.join(TYPES)})"


def _unmatched(name: str, rule: Rule, rows: list[PlanRow]) -> str:
    names = [row.name for row in rows]
    plain = [pattern.strip("*").removeprefix("re:") for pattern in rule.match]
    near = [hit for pattern in plain for hit in difflib.get_close_matches(pattern, names, 3, cutoff=0.3)]
    near += [found for found in names if found.rpartition(".")[2] in {hit.rpartition(".")[2] for hit in plain}]
    hint = _some(list(dict.fromkeys(near or names)) or ["none at all"])
    wanted = f"match {rule.match}" + (f" with types {list(rule.types)}" if rule.types else "")
    return f"rules.{name} matches no layer ({wanted}); nearest layer names: {hint}; correct it or set optional: true"


def _tied_reasons(model: nn.Module, rows: list[PlanRow], recipe: Recipe, adapters: Adapters) -> list[str]:
    """Modules that share a parameter must agree on its grid, in every phase."""
    owners: dict[int, list[PlanRow]] = {}
    by_name = {row.name: row for row in rows}
    for name, module in model.named_modules():
        row = by_name.get(name) or PlanRow(name, type(module).__name__, None, None, None, 0)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                # a parameter that is none of the layer's weights is read in float
                owners.setdefault(id(parameter), []).append(row if key in row.kinds else replace(row, weight=None))
    found = []
    for tied in owners.values():
        bits = {tuple(phase.bits.get(row.weight_rule or "") for phase in recipe.phases.values()) for row in tied}
        if len({row.weight for row in tied}) > 1 or (len(bits) > 1 and tied[0].weight is not None):
            said = ", ".join(f"{row.name}: {row.weight or 'float'}" for row in tied)
            found.append(f"these layers share one weight but not one grid ({said}); give them the same rule")
        adapted = next((row.name for row in tied if row.name in adapters.of), None)
        if adapted is not None and len(tied) > 1:
            others = ", ".join(row.name for row in tied if row.name != adapted)
            found.append(
                f"{adapted} has an adapter, but shares its weight with {others}; leave it out of target_modules"
            )
    return found


def _totals(model: nn.Module, recipe: Recipe, rows: list[PlanRow], left: list[PlanRow], adapters: set[int]) -> Plan:
    counted: set[int] = set()
    kept = []
    own = adapters | {
        id(p) for m in model.modules() for key, p in m._parameters.items() if p is not None and isinstance(m, Quantizer)
    }
    for row in rows:
        module = model.get_submodule(row.name)
        fresh = [module._parameters[key] for key in row.kinds if id(module._parameters[key]) not in counted]
        counted |= {id(p) for p in fresh}
        kept.append(replace(row, params=sum(p.numel() for p in fresh if p is not None)))
    quantized = {id(model.get_submodule(row.name)._parameters[key]) for row in rows if row.weight for key in row.kinds}
    everything = [p for p in model.parameters() if id(p) not in own and _is_plain(p)]
    rest = sum(p.numel() * p.element_size() for p in everything if id(p) not in quantized)
    return Plan(recipe.name, kept, left, sum(p.numel() for p in everything), rest)


def _some(items: list[str], joint: str = ", ") -> str:
    shown = joint.join(items[:_LISTED_REASONS])
    more = len(items) - _LISTED_REASONS
    return f"{shown}{joint}and {more} more" if more > 0 else shown
