"""Both of Lightning's names: `import lightning` and `import pytorch_lightning`.

They are two copies of one program, and a callback of one is no instance of the other's `Callback`. An object made here
gets, when it is made, the `Callback` of every copy that is loaded as a base; so it fits whichever trainer the script
uses, and neither copy is imported before the script has chosen.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from qat.errors import QATError

_NAMES = ("lightning.pytorch", "pytorch_lightning")

if TYPE_CHECKING:
    from pytorch_lightning import Callback as _Base
else:
    _Base = object

_joined: dict[tuple[type, ...], Any] = {}


class AnyCallback(_Base):
    """First base of our callbacks; `__new__` adds Lightning's own."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(joined(cls))

    def __reduce__(self) -> tuple[Any, ...]:
        return _revive, (_plain(type(self)),), self.__dict__


def joined(cls: type) -> Any:
    """`cls` with the `Callback` of every loaded copy of Lightning among its bases; made once for each set of copies."""
    cls = _plain(cls)
    bases = tuple(base for base in _loaded() if not issubclass(cls, base))
    if not bases:
        return cls
    if (cls, *bases) not in _joined:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "_plain": cls}
        _joined[(cls, *bases)] = type(cls.__name__, (cls, *bases), names)
    return _joined[(cls, *bases)]


def _plain(cls: type) -> type:
    """The class as it was written."""
    found: type = cls.__dict__.get("_plain", cls)
    return found


def _loaded() -> list[type]:
    found = [getattr(sys.modules.get(name), "Callback", None) for name in _NAMES]
    bases = [base for base in found if base is not None]
    return bases or [_first_installed()]


def _first_installed() -> type:
    """Neither copy is loaded yet: take the one that is there."""
    for name in _NAMES:
        try:
            base: type = importlib.import_module(name).Callback
        except ModuleNotFoundError as problem:
            if problem.name not in (name, name.partition(".")[0]):
                raise
            continue
        return base
    raise QATError("neither pytorch_lightning nor lightning is installed; pip install pytorch-lightning")


def _revive(cls: type) -> Any:
    return object.__new__(joined(cls))


def is_a(thing: object, name: str) -> bool:
    """Whether a class called `name` from either copy of Lightning is among the classes of `thing`."""
    return any(
        cls.__name__ == name and cls.__module__.partition(".")[0] in ("lightning", "pytorch_lightning")
        for cls in type(thing).__mro__
    )


def overrides(pl_module: Any, hook: str) -> bool:
    """Whether a LightningModule's class, or the instance, has a `hook` of its own."""
    if hook in pl_module.__dict__:
        return True
    definer = next(cls for cls in type(pl_module).__mro__ if hook in cls.__dict__)
    return definer.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning")
