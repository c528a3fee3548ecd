"""Can this `fold` be? Reasons why not, as in `qat.recipes.checks`."""

from __future__ import annotations

from qat.recipes.schema import Fold, Network, Recipe
from qat.recipes.shape import nearest, show

METHODS = ("none", "rotate", "smooth", "awq")
# words -> the methods that read them
_READ_BY = {"seed": ("rotate",), "alpha": ("smooth",), "batches": ("smooth", "awq"), "network": METHODS[1:]}


def reasons(recipe: Recipe) -> list[str]:
    """Why the recipe's `fold` cannot be; empty means it can."""
    fold = recipe.fold
    if fold.method not in METHODS:
        near = nearest(fold.method, METHODS)
        return [f"fold.method: {show(fold.method)} is not allowed{near}; allowed: {', '.join(METHODS)}"]
    found = []
    for key, methods in _READ_BY.items():
        value, default = getattr(fold, key), getattr(Fold(), key)
        if fold.method not in methods and value != default:
            found.append(
                f"fold.{key}: {show(value) if key != 'network' else 'it'} is not allowed with method={fold.method}; "
                f"leave it out, or method={' or '.join(methods)}"
            )
    if not 0 <= fold.alpha <= 1:
        found.append(f"fold.alpha: {show(fold.alpha)} is not allowed; allowed: [0, 1]")
    if fold.batches < 1:
        found.append(f"fold.batches: {show(fold.batches)} is not allowed; allowed: 1 or more")
    if fold.seed < 0:
        found.append(f"fold.seed: {show(fold.seed)} is not allowed; allowed: 0 or more")
    if fold.network is not None:
        found += _network(fold.network, fold.method)
    first = next(iter(recipe.phases.values()), None)
    if fold.method in ("smooth", "awq") and first is not None and not first.quantize and first.steps:
        found.append(
            f"fold.method: {fold.method} is not allowed with a first phase in float, after which inputs are others; "
            "allowed: none or rotate, or quantize=true there"
        )
    return found


def _network(network: Network, method: str) -> list[str]:
    found = []
    if method == "rotate" and not network.writes:
        found.append("fold.network.writes: [] is not allowed with method=rotate; name what adds to the residual stream")
    if not network.reads:
        found.append("fold.network.reads: {} is not allowed; name the norms, each with the linears after it")
    if network.head_dim is not None and network.head_dim < 1:
        found.append(f"fold.network.head_dim: {show(network.head_dim)} is not allowed; allowed: 1 or more, or null")
    pairs = [(key, name, [value]) for key in ("values", "products") for name, value in getattr(network, key).items()]
    pairs += [("reads", name, readers) for name, readers in network.reads.items()]
    pairs += [("writes", name, [name]) for name in network.writes]
    for key, name, others in pairs:
        if not others:
            found.append(f"fold.network.reads.{name}: [] is not allowed; name the linears after the norm")
        for other in others:
            if not name or not other:
                found.append(f'fold.network.{key}: "" names nothing; write the name of a module')
            elif other.count("*") > name.count("*"):
                found.append(f"fold.network.{key}: {show(other)} has more stars than {show(name)}, which it belongs to")
    return found
