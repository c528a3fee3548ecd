"""Images from folders and tables, transformers models and plain modules."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from qat.errors import QATError
from qat.recipes import load_recipe
from qat.recipes.schema import Train
from qat.tasks import run
from qat.tasks.image_classification import ImageClassification, build


@pytest.fixture(scope="module")
def resnet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("resnet")
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=5)
    ResNetForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for label, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(5):
            Image.new("RGB", (20 + index, 16), colour).save(tmp_path / "images" / label / f"{index}.png")
    return tmp_path / "images"


def test_a_folder_for_each_class(resnet_folder: Path, images: Path) -> None:
    train = Train(model=str(resnet_folder), data=[str(images)], batch_size=4, val_fraction=0.2)
    module, data, _ = build(train)
    pixels, labels = next(iter(data.train_dataloader()))
    assert pixels.shape == (4, 3, 16, 16) and set(labels.tolist()) <= {0, 1}
    assert module.model.config.id2label == {0: "blue", 1: "red"} and len(data.val) == 2
    assert module(pixels).shape == (4, 2)
    loss, figures = module.loss((pixels, labels))
    assert loss.requires_grad and 0.0 <= float(figures["accuracy"]) <= 1.0


def test_parquet_with_bytes(resnet_folder: Path, images: Path, tmp_path: Path) -> None:
    import datasets

    records = [
        {"image": {"bytes": file.read_bytes(), "path": None}, "label": int(file.parent.name == "red")}
        for file in sorted(images.glob("*/*.png"))
    ]
    datasets.Dataset.from_list(records).to_parquet(str(tmp_path / "images.parquet"))
    train = Train(model=str(resnet_folder), data=[str(tmp_path / "images.parquet")], batch_size=4)
    _, data, _ = build(train)
    assert next(iter(data.train_dataloader()))[0].shape == (4, 3, 16, 16)


def test_a_plain_module() -> None:
    module = ImageClassification(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), Train())
    loss, _ = module.loss((torch.randn(2, 1, 4, 4), torch.tensor([0, 2])))
    loss.backward()
    assert module.configure_optimizers()["optimizer"].param_groups[0]["lr"] > 0


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "no classes": ({"data": ["flat"]}, "no sub-folders with images"),
    "one class": ({"data": ["single"]}, "at least two are needed"),
    "not an image": ({"data": ["fake"]}, "is not an image that can be read"),
    "no label": ({"data": ["records.jsonl"], "image_key": "file"}, "train.label_key='label' is in no record"),
    "no image": ({"data": ["records.jsonl"], "label_key": "kind"}, "train.image_key='image' is in no record"),
    "missing": ({"data": ["gone"]}, "gone does not exist"),
    "no processor": ({"model": "bare"}, "preprocessor_config.json"),
    "class only in validation": ({"val_data": ["single"]}, "which train.data does not have"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_for_what_is_wrong(
    name: str, resnet_folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(png())
    (tmp_path / "single" / "green").mkdir(parents=True)
    (tmp_path / "single" / "green" / "a.png").write_bytes(png())
    for label in ("a", "b"):
        (tmp_path / "fake" / label).mkdir(parents=True)
        for index in range(3):
            (tmp_path / "fake" / label / f"{index}.png").write_text("no image")
    (tmp_path / "records.jsonl").write_text(json.dumps({"file": "a.png", "kind": 1}) + "\n")
    (tmp_path / "bare").mkdir()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / file).write_bytes((resnet_folder / file).read_bytes())
    settings, words = CASES[name]
    with pytest.raises(QATError) as refused:
        build(Train(**{"model": str(resnet_folder), "data": [str(images)], **settings}))
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_from_recipe_to_report(resnet_folder: Path, images: Path, tmp_path: Path) -> None:
    """The whole of `qat train`; learned input ranges, no export target."""
    recipe = load_recipe(
        "cnn_w4a4",
        [
            "train.task=image_classification",
            f"train.model={resnet_folder}",
            f"train.data=['{images}']",
            f"train.out={tmp_path / 'run'}",
            "train.max_steps=3",
            "train.val_every=2",
            "train.val_fraction=0.2",
            "train.batch_size=4",
            "train.accelerator=cpu",
        ],
    )
    results = run(recipe)
    assert 0.0 <= results["metrics"]["val/accuracy"] <= 1.0 and results["exports"] == {}
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()
    assert "int4 tensor zp portable lsq" in results["plan"]
