"""What `qat` raises when it refuses something: one sentence that names the place and the fix.

The command line prints the sentence and exits with code 2; nothing has been written when one is raised.
"""


class QATError(Exception):
    """A recipe, model, file or environment that cannot be used as given."""


class RecipeError(QATError):
    """A recipe that cannot be read or cannot hold; the message carries the full key path."""


class ExportError(QATError):
    """A model or folder that cannot be exported, read back or verified."""


# Formats that are asked for and cannot be: name -> why.
IMPOSSIBLE_FORMATS = {
    "exl3": (
        "exl3 codes weights along a trellis in a rotated basis (QTIP), where no integer code of a training has a place "
        "of its own; the nearest format is exl2"
    ),
}


def refuse_if(reasons: list[str], what: str, error: type[QATError] = QATError) -> None:
    """Raise `error` with every reason if there is one; an empty list means yes."""
    if reasons:
        raise error(f"{what}: " + "; ".join(reasons))
