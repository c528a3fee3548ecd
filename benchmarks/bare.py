"""`qat.prepare` on a machine that has nothing but torch: stand-ins for the two packages that read recipes.

A recipe that a benchmark writes as plain data is checked by `qat.recipes` itself; of OmegaConf only the last step is
used, merging a checked mapping into the dataclasses of `qat.recipes.schema`, and of PyYAML nothing but a base class.
Where the real packages are installed they are used.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import typing
from types import ModuleType
from typing import Any


def install() -> list[str]:
    """Put a stand-in in place of each package that is missing; their names."""
    needed = {"yaml": _yaml, "omegaconf": _omegaconf}
    absent = [name for name in needed if name not in sys.modules and importlib.util.find_spec(name) is None]
    for name in absent:
        needed[name]()
    return absent


def _yaml() -> None:
    class SafeLoader:
        @classmethod
        def add_implicit_resolver(cls, *_: Any) -> None:
            """Nothing is read here."""

    module: Any = ModuleType("yaml")
    module.SafeLoader, module.YAMLError = SafeLoader, type("YAMLError", (ValueError,), {})
    for name in ("Node", "ScalarNode", "MappingNode", "AliasEvent"):
        setattr(module, name, type(name, (), {}))
    sys.modules["yaml"] = module


def _omegaconf() -> None:
    class OmegaConf:
        structured = staticmethod(lambda base: base)
        merge = staticmethod(lambda base, data: (base, data))
        to_object = staticmethod(lambda merged: _merged(*merged))
        to_container = staticmethod(lambda data, **_: data)

    module: Any = ModuleType("omegaconf")
    errors: Any = ModuleType("omegaconf.errors")
    module.OmegaConf, module.DictConfig = OmegaConf, type("DictConfig", (dict,), {})
    errors.OmegaConfBaseException = module.OmegaConfBaseException = type("OmegaConfBaseException", (ValueError,), {})
    module.errors = errors
    sys.modules |= {"omegaconf": module, "omegaconf.errors": errors}


def _merged(base: Any, data: Any) -> Any:
    """`base`, a dataclass instance, with the entries of the mapping `data` over it; values follow the types' lead."""
    hints = typing.get_type_hints(type(base))
    changed = {name: _value(hints[name], getattr(base, name), entry) for name, entry in data.items()}
    return dataclasses.replace(base, **changed)


def _value(hint: Any, old: Any, data: Any) -> Any:
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if data is None:
        return None
    if typing.get_origin(hint) is dict:
        return dict(old) | {name: _value(kinds[1], None, entry) for name, entry in data.items()}
    if typing.get_origin(hint) is list:
        return [_value(kinds[0], None, entry) for entry in data]
    kind = kinds[0] if kinds else hint
    if dataclasses.is_dataclass(kind):
        if isinstance(data, kind):  # type: ignore[arg-type]
            return data
        return _merged(old if old is not None else kind(), data)  # type: ignore[operator]
    return float(data) if kind is float else data
