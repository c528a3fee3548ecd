"""Methods of one instance replaced for a while, and put back in any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Patch:
    """`owner.<name>` is `around(original, *args, **kwargs)` until `undo`.

    The replacement is a plain function in the instance's `__dict__`: Lightning compares code objects to find out if a
    hook is overridden, and no strategy wipes it. `transparent` lets Lightning see the signature of the original, which
    decides what arguments a step gets; it must be off for a hook that the class itself does not override.
    """

    def __init__(self, owner: Any, name: str, around: Callable[..., Any], *, transparent: bool = True) -> None:
        self.owner, self.name, self.active = owner, name, True
        self._missing = object()
        self._before = owner.__dict__.get(name, self._missing)
        original = getattr(owner, name)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs) if self.active else original(*args, **kwargs)

        replacement.__name__ = name
        replacement.__dict__["_qat_patch"] = self
        if transparent:
            replacement.__dict__["__wrapped__"] = getattr(original, "__wrapped__", original)
        owner.__dict__[name] = replacement

    def undo(self) -> None:
        """Put the original back; under a newer patch, let calls through and leave the removal to that one."""
        self.active = False
        while True:
            patch = getattr(self.owner.__dict__.get(self.name), "_qat_patch", None)
            if patch is None or patch.active:
                return
            if patch._before is patch._missing:
                del self.owner.__dict__[self.name]
            else:
                self.owner.__dict__[self.name] = patch._before
