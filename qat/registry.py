"""Name -> class by discovery: a class registers by living in its folder, or through an entry point."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any

from qat.errors import QATError


@cache
def discover(package: str, base: type, entry_point_group: str) -> MappingProxyType[str, type[Any]]:
    """Every class below `base` that has a `name` of its own, from the modules of `package` and the entry points.

    Raises QATError if two classes share a name.
    """
    folder = importlib.import_module(package)
    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{package}.{module.name}")
    for point in entry_points(group=entry_point_group):
        point.load()
    found: dict[str, type[Any]] = {}
    todo: list[type[Any]] = list(base.__subclasses__())
    while todo:
        cls = todo.pop()
        todo.extend(cls.__subclasses__())
        name = cls.__dict__.get("name", "")
        if not name:
            continue
        if name in found and found[name] is not cls:
            raise QATError(f"{cls.__qualname__} and {found[name].__qualname__} are both called {name!r}; rename one")
        found[name] = cls
    return MappingProxyType(dict(sorted(found.items())))


def lookup(found: MappingProxyType[str, type[Any]], name: str, what: str) -> type[Any]:
    """`found[name]`; raises QATError that lists the known names."""
    if name not in found:
        raise QATError(f"{what}={name!r} is unknown; use one of {', '.join(found)}")
    return found[name]
