"""Image classification: a transformers model with its own image processor, or any torch module that gives logits.

Data is a folder of images with one sub-folder for each class, or parquet and jsonl files whose records keep an image
under `train.image_key` and a class under `train.label_key`. Labels of a model that was trained on other classes get a
new head.
"""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.errors import QATError
from qat.hf import load_model, read_config
from qat.recipes.schema import Train
from qat.tasks.base import TABLES, Batches, Task, need_model, read_records, split, value_of

log = logging.getLogger(__name__)
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")


class ImageClassification(Task):
    """Cross entropy. Batch: (images [B, C, H, W], labels [B] int64); the model gives logits [B, classes]."""

    def __init__(self, model: nn.Module, train: Train) -> None:
        super().__init__(model, train)
        self.transformers = hasattr(model, "config") and hasattr(model, "from_pretrained")

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes]."""
        out = self.model(pixel_values=images) if self.transformers else self.model(images)
        return out if isinstance(out, Tensor) else out.logits

    def loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batch
        logits = self(images)
        accuracy = (logits.argmax(-1) == labels).float().mean()
        return F.cross_entropy(logits.float(), labels), {"accuracy": accuracy}


def build(train: Train) -> tuple[ImageClassification, Batches, None]:
    """(module, data, None) from a recipe's `train`. Raises QATError for a model or data that cannot be used."""
    folder = need_model(train)
    read_config(folder)
    samples = read_images(train, train.data, "train.data")
    held_out = read_images(train, train.val_data, "train.val_data") if train.val_data else []
    classes = sorted({label for _, label in samples}, key=str)
    if len(classes) < 2:
        raise QATError(
            f"train.data: all {len(samples)} images are of the class {classes[0]!r}; at least two are needed"
        )
    unknown = sorted({label for _, label in held_out} - set(classes), key=str)
    if unknown:
        raise QATError(f"train.val_data has the class {unknown[0]!r}, which train.data does not have")
    if not train.val_data:
        samples, held_out = split(samples, train.val_fraction, train.seed)
    names = {str(label): index for index, label in enumerate(classes)}
    config = read_config(folder)
    if len(classes) != config.num_labels:
        log.warning("%s has %d classes, the data %d: a new head is trained", folder, config.num_labels, len(classes))
    model = load_model(
        folder,
        auto="AutoModelForImageClassification",
        dtype=torch.float32,
        may_lack=True,
        num_labels=len(classes),
        label2id=names,
        id2label={index: name for name, index in names.items()},
    )
    processor = load_processor(folder)

    def collate(batch: list[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
        pixels = processor(images=[open_image(image) for image, _ in batch], return_tensors="pt")["pixel_values"]
        return pixels, torch.tensor([names[str(label)] for _, label in batch])

    # what a graph is traced with: a network of convolutions takes images of any size
    model.example_input_array = {"pixel_values": collate([samples[0], samples[0]])[0]}  # type: ignore[assignment]
    return ImageClassification(model.train(), train), Batches(samples, held_out, train, collate), None


def load_processor(folder: str) -> Any:
    """The model's image processor. Raises QATError if its folder has none."""
    if not (Path(folder) / "preprocessor_config.json").is_file():
        raise QATError(
            f"model folder {folder} holds no preprocessor_config.json; save_pretrained of its image processor writes it"
        )
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as problem:
        raise QATError(f"the image processor in {folder} cannot be loaded: {_sentence(problem)}") from None


def example_images(folder: Path) -> dict[str, Tensor] | None:
    """Two blank images as the folder's image processor gives them, to trace a graph with; None if it has none."""
    if not (folder / "preprocessor_config.json").is_file():
        return None
    from PIL import Image

    blank = Image.new("RGB", (64, 64))
    return dict(load_processor(str(folder))(images=[blank, blank], return_tensors="pt"))


def read_images(train: Train, paths: list[str], key: str) -> list[tuple[Any, Any]]:
    """(path, bytes or image, label) pairs. Raises QATError for folders without classes and records without the keys."""
    found: list[tuple[Any, Any]] = []
    tables: list[str] = []
    for entry in paths:
        path = Path(entry)
        if path.is_dir() and not any(file.suffix.lower() in TABLES for file in path.iterdir()):
            images = sorted(file for file in path.glob("*/*") if file.suffix.lower() in IMAGES)
            if not images:
                raise QATError(
                    f"{key}: {path} has no sub-folders with images ({', '.join(IMAGES)}), one for each class"
                )
            found += [(str(image), image.parent.name) for image in images]
        else:
            tables.append(entry)
    if tables or not paths:
        for record in read_records(tables, key):
            image = value_of(record, train.image_key, "train.image_key", object)
            found.append((image, value_of(record, train.label_key, "train.label_key", (int, str))))
    return found


def open_image(image: Any) -> Any:
    """A path, bytes, {"bytes", "path"} or an image -> an RGB `PIL.Image`. Raises QATError for anything else."""
    from PIL import Image, UnidentifiedImageError

    source = image
    if isinstance(image, dict):
        source = image.get("bytes") or image.get("path")
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    try:
        opened = source if isinstance(source, Image.Image) else Image.open(source)
        return opened.convert("RGB")
    except (UnidentifiedImageError, OSError, AttributeError, TypeError, ValueError) as problem:
        raise QATError(
            f"train.data: {str(image)[:80]} is not an image that can be read: {_sentence(problem)}"
        ) from None


def _sentence(problem: Exception) -> str:
    return next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
