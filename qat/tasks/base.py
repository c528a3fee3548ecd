"""What all tasks share: the module with its optimizer, files from paths, a split into training and validation."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import QATError
from qat.recipes.schema import Train
from qat.tasks.flavour import lightning

log = logging.getLogger(__name__)
_Module: Any = lightning().LightningModule
_DataModule: Any = lightning().LightningDataModule

TEXT = {".txt": "text", ".md": "text", ".rst": "text", ".py": "text"}
TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class Task(_Module):  # type: ignore[misc]
    """A model, its loss and AdamW with a warm-up and a cosine or constant schedule; a subclass writes `loss(batch)`."""

    def __init__(self, model: nn.Module, train: Train) -> None:
        super().__init__()
        self.model = model
        self.options = train

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """(what to minimize, further figures to log under their names)."""
        raise NotImplementedError(f"{type(self).__name__}.loss")

    def rows(self, batch: Any) -> int:
        """Samples of a batch, for means over batches of different sizes."""
        return len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0])

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss, figures = self.loss(batch)
        values = {"loss": loss, **figures}
        self.log_dict({f"train/{name}": value.detach() for name, value in values.items()}, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        loss, figures = self.loss(batch)
        values = {"loss": loss, **figures}
        self.log_dict(
            {f"val/{name}": value for name, value in values.items()},
            prog_bar=True,
            on_epoch=True,
            sync_dist=True,
            batch_size=self.rows(batch),
        )

    def configure_optimizers(self) -> Any:
        options = self.options
        # Weight decay on matrices only: gains, biases and learned scales have one dimension, or are no weights.
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        decayed = [p for name, p in named if p.ndim > 1 and "_quantizer." not in name]
        other = [p for name, p in named if p.ndim <= 1 or "_quantizer." in name]
        groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": other, "weight_decay": 0.0}]
        betas = (options.betas[0], options.betas[1])
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], options.lr, betas)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(options, step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def learning_rate_factor(options: Train, step: int) -> float:
    """Linear warm-up over `warmup_fraction` of max_steps, then constant or a cosine down to zero."""
    warm = max(1, round(options.warmup_fraction * options.max_steps)) if options.warmup_fraction > 0 else 0
    if step < warm:
        return (step + 1) / (warm + 1)
    if options.scheduler == "constant":
        return 1.0
    done = (step - warm) / max(1, options.max_steps - warm)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def need_model(train: Train) -> str:
    """`train.model`; raises QATError if the recipe names none."""
    if not train.model:
        raise QATError("train.model is not set; give the folder of a model: train.model=PATH")
    return train.model


def find_files(paths: Sequence[str], kinds: Iterable[str], key: str = "train.data") -> list[Path]:
    """Files named by `paths`; a folder stands for every file below it whose ending is in `kinds`.

    Raises QATError for no paths, a path that does not exist, a file of another kind, or a folder without any.
    """
    allowed = tuple(kinds)
    if not paths:
        raise QATError(f"{key} is empty; give files or folders: {key}='[PATH]' ({', '.join(allowed)})")
    found: list[Path] = []
    for entry in paths:
        path = Path(entry)
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in allowed)
            if not inside:
                raise QATError(f"{key}: the folder {path} holds no file ending in {', '.join(allowed)}")
            found += inside
        elif not path.exists():
            raise QATError(f"{key}: {path} does not exist")
        elif path.suffix.lower() not in allowed:
            ending = path.suffix or "nothing"
            raise QATError(f"{key}: {path} ends in {ending}; files that can be read end in {', '.join(allowed)}")
        else:
            found.append(path)
    return found


def read_records(paths: Sequence[str], key: str = "train.data") -> list[dict[str, Any]]:
    """Records of text, jsonl, json and parquet files in order; a text file is one record {"text": ...}.

    Raises QATError for files that cannot be read (naming the line of a jsonl file) or hold nothing.
    """
    records: list[dict[str, Any]] = []
    for path in find_files(paths, (*TEXT, *TABLES), key):
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            found = _parquet(path, key)
        else:
            try:
                text = path.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as problem:
                raise QATError(f"{key}: {path} is not UTF-8 text ({problem})") from None
            found = [{"text": text}] if suffix in TEXT else _json(text, path, key)
        records += found
    if not records:
        raise QATError(f"{key}: {', '.join(map(str, paths))} hold no record")
    return records


def _parquet(path: Path, key: str) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()  # type: ignore[no-any-return]
    except (pyarrow.ArrowException, OSError) as problem:
        raise QATError(f"{key}: {path} cannot be read as parquet: {problem}") from None


def _json(text: str, path: Path, key: str) -> list[dict[str, Any]]:
    """One object per line, or (.json) one list of objects."""
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        parts = [("", text)]
    else:
        # Unicode has line ends of its own, which JSON text may hold: only "\n" ends a record
        parts = [(f", line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    found: list[dict[str, Any]] = []
    for where, part in parts:
        try:
            value = json.loads(part)
        except (ValueError, RecursionError) as problem:
            raise QATError(f"{key}: {path}{where} is not JSON: {problem}") from None
        for index, record in enumerate(value if not where else [value]):
            if not isinstance(record, dict):
                place = where or f", entry {index + 1}"
                raise QATError(f"{key}: {path}{place} is {type(record).__name__}, not an object with keys")
            found.append(record)
    return found


def value_of(record: dict[str, Any], key: str, setting: str, what: type | tuple[type, ...]) -> Any:
    """`record[key]`, checked; raises QATError that names the recipe's setting and the keys that there are."""
    if key not in record:
        raise QATError(f"{setting}={key!r} is in no record; the keys are {', '.join(map(repr, record))}")
    value = record[key]
    if not isinstance(value, what):
        raise QATError(f"{setting}={key!r} holds {type(value).__name__} where {_names(what)} is needed")
    return value


def _names(what: type | tuple[type, ...]) -> str:
    return " or ".join(t.__name__ for t in (what if isinstance(what, tuple) else (what,)))


def split(items: list[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """(train, validation): about `fraction` of the items, chosen by a hash of their position and the seed.

    At least one item goes to validation, and at least one stays; with a single item validation is empty.
    """
    if fraction <= 0.0 or len(items) < 2:
        return items, []

    def place(index: int) -> bytes:
        return hashlib.sha256(f"{seed}:{index}".encode()).digest()

    count = min(max(1, round(fraction * len(items))), len(items) - 1)
    chosen = set(sorted(range(len(items)), key=place)[:count])
    return [x for i, x in enumerate(items) if i not in chosen], [x for i, x in enumerate(items) if i in chosen]


class Loader(torch.utils.data.DataLoader[Any]):
    """A loader that goes on in the middle of an epoch: Lightning keeps its `state_dict` in the checkpoint.

    Every epoch shuffles with the generator's first seed plus the number of the epoch.
    """

    epoch = done = skip = 0

    def __iter__(self) -> Any:
        if self.generator is not None:
            self.generator.manual_seed(self.generator.initial_seed() - self._shift + self.epoch)
            self._shift = self.epoch
        skip, self.skip = self.skip, 0
        for index, batch in enumerate(super().__iter__()):
            self.done = index + 1
            if index >= skip:
                yield batch
        self.epoch, self.done = self.epoch + 1, 0

    _shift = 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.skip = state["epoch"], state["done"]


class Batches(_DataModule):  # type: ignore[misc]
    """Training and validation data sets with one collate function; training order depends on the seed alone."""

    def __init__(self, train: Any, val: Any, options: Train, collate: Any = None) -> None:
        super().__init__()
        self.train, self.val, self.options, self.collate = train, val, options, collate

    def _loader(self, data: Any, shuffle: bool) -> Any:
        options = self.options
        return Loader(
            data,
            options.batch_size,
            shuffle=shuffle,
            collate_fn=self.collate,
            num_workers=options.num_workers,
            generator=torch.Generator().manual_seed(options.seed) if shuffle else None,
            drop_last=shuffle and len(data) >= options.batch_size,
        )

    def train_dataloader(self) -> Any:
        return self._loader(self.train, True)

    def val_dataloader(self) -> Any:
        return self._loader(self.val, False) if len(self.val) else []
