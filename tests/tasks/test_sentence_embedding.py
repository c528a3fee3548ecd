"""Sentence embeddings learned from the float encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qat
from qat.errors import QATError
from qat.recipes import load_recipe
from qat.recipes.schema import Train
from qat.tasks import run
from qat.tasks.sentence_embedding import build, embed


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    path = tmp_path / "sentences.txt"
    path.write_text("\n".join(f"return number {i} and no more" for i in range(20)) + "\n\n")
    return path


def test_the_float_model_has_no_loss_against_itself(bert_folder: Path, sentences: Path) -> None:
    module, data, _ = build(Train(model=str(bert_folder), data=[str(sentences)], batch_size=4))
    assert len(data.train) + len(data.val) == 20
    batch = next(iter(data.train_dataloader()))
    loss, figures = module.loss(batch)
    assert abs(float(loss)) < 1e-6 and abs(float(figures["cosine"]) - 1.0) < 1e-6
    assert not any("teacher" in name for name in module.state_dict())
    assert not any(p.requires_grad for p in module.teacher.parameters())


def test_padding_changes_no_embedding(bert_folder: Path, sentences: Path) -> None:
    module, data, _ = build(Train(model=str(bert_folder), data=[str(sentences)], batch_size=4))
    batch = data.collate(["return", "return number 3 and no more"])
    alone = data.collate(["return"])
    together = embed(module.model, batch["input_ids"], batch["attention_mask"])[0][0]
    assert torch.allclose(together, embed(module.model, alone["input_ids"], alone["attention_mask"])[0][0], atol=1e-6)
    assert abs(float(together.norm()) - 1.0) < 1e-5


@pytest.mark.parametrize(
    ("text", "words"), [(None, "does not exist"), ("", "no sentence"), ("\n \n", "no sentence")], ids=str
)
def test_one_sentence_for_what_is_wrong(bert_folder: Path, tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "data.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(QATError, match=words):
        build(Train(model=str(bert_folder), data=[str(path)]))


def test_from_recipe_to_verified_file(bert_folder: Path, sentences: Path, tmp_path: Path) -> None:
    """The whole of `qat train`, and transformers' own reader on the file."""
    recipe = load_recipe(
        "w4a16_g128",
        [
            "train.task=sentence_embedding",
            "rules.linears.weight.group_size=32",
            f"train.model={bert_folder}",
            f"train.data=['{sentences}']",
            f"train.out={tmp_path / 'run'}",
            "train.max_steps=3",
            "train.val_every=2",
            "train.batch_size=4",
            "train.accelerator=cpu",
        ],
    )
    results = run(recipe)
    assert 0.9 < results["metrics"]["val/cosine"] <= 1.0
    rows = qat.verify(results["exports"]["compressed-tensors"])
    assert sum(row.spec != "float" for row in rows) >= 6 and all(row.max_abs_diff == 0 for row in rows)
