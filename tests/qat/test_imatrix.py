"""Scales that are searched for the error that inputs see, from batches or from llama.cpp's importance matrix.

Mutations that were tried one at a time, and the test that turned red for each:

    of tied layers the first alone / the importance not used / layers not float meanwhile / blocks of a transposed
    convolution not flattened                    test_scales_are_those_of_the_inputs_of_the_float_model
    dynamic scales searched                      test_what_is_left_and_what_is_refused
    sums not divided by their counts             test_an_importance_matrix_of_llama_cpp
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import qat
from qat.errors import QATError
from qat.init.imatrix import read_imatrix, search_weighted
from qat.init.inputs import Moments, Squares, importance
from qat.layers import weight_quantizers
from qat.quantizers.mse import search
from qat.recipes import Recipe
from qat.steps import qat_layers

Build = Callable[..., Recipe]


class Net(nn.Module):
    """Convolutions of all kinds, a linear that runs twice, one tied to another, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.a, self.b, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.conv(x).relu()).flatten(2).mT * torch.tensor([1.0, 10.0, 0.1, 3.0])
        y: Tensor = self.b(self.a(x) + self.a(x.flip(1)))
        return y


def pictures() -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(2, 4, 5, 5, generator=g) for _ in range(2)]


def small(recipe: Build, **slot: Any) -> Recipe:
    return recipe(types=["Linear", "Conv2d", "ConvTranspose2d"], bits=3, granularity="channel", quantizer="lsq", **slot)


def test_scales_are_those_of_the_inputs_of_the_float_model(recipe: Build) -> None:
    """Found by hand from the moments of what each layer sees while the others are float."""
    plain, model = Net(), Net()
    seen: dict[str, list[tuple[Tensor, ...]]] = {}
    for name, layer in plain.named_children():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args))
    for batch in pictures():
        plain(batch)
    qat.prepare(model, small(recipe))
    before = {
        name: weight_quantizers(layer)["weight"].start().scale.clone() for name, layer in qat_layers(model).items()
    }
    rows = {row.name: row for row in search_weighted(model, pictures())}
    assert rows["idle"].error is None and "inputs" in rows["idle"].note
    squares: dict[str, Tensor] = {}
    for name, calls in seen.items():
        moments = Moments()
        for args in calls:
            moments.add(qat_layers(model)[name], args, {})
        squares[name] = moments.mean(qat_layers(model)[name]).diagonal(dim1=1, dim2=2)
    squares["a"] = squares["b"] = (squares["a"] + squares["b"]) / 2
    for name, layer in qat_layers(model).items():
        quantizer: Any = weight_quantizers(layer)["weight"]
        if name == "idle":
            assert torch.equal(quantizer.start().scale, before[name])
            continue
        w = quantizer.layout.to_rows(layer.weight.detach()).float()
        wanted = search(w, quantizer.spec, importance(squares[name], w.shape[0])).scale
        assert torch.equal(quantizer.start().scale, wanted), name
        assert rows[name].error is not None and rows[name].error <= rows[name].rtn  # type: ignore[operator]
    assert not torch.equal(weight_quantizers(model.a)["weight"].start().scale, before["a"])
    assert all(
        torch.equal(p, dict(plain.named_parameters())[n]) for n, p in model.named_parameters() if n.endswith("weight")
    )


def test_scales_stay_until_weights_change(recipe: Build) -> None:
    """`initialize` leaves them alone, training goes on from them: codes that were computed before are forgotten."""
    model = Net()
    qat.prepare(model, small(recipe))
    x = torch.randn(3, 4)
    model.a(x)
    search_weighted(model, pictures())
    quantizer: Any = weight_quantizers(model.a)["weight"]
    found = quantizer.start().scale.clone()
    qat.initialize(model)
    assert torch.equal(quantizer.start().scale, found)
    fake = quantizer(model.a.weight).detach()
    assert torch.equal(qat.convert(model)["a.weight"].dequantize(), fake)
    assert torch.equal(model.a(x), nn.functional.linear(x, fake, model.a.bias))
    with torch.no_grad():
        model.a.weight.mul_(3)
    qat.initialize(model)
    assert not torch.equal(quantizer.start().scale, found)


def test_what_is_left_and_what_is_refused(recipe: Build) -> None:
    model = Net()
    qat.prepare(model, small(recipe))
    with pytest.raises(QATError, match="the batches reach none of its layers"):
        search_weighted(model, [])
    with pytest.raises(QATError, match="the squares name none of its weights"):
        search_weighted(model, squares={"c.weight": torch.ones(4)})
    with pytest.raises(QATError, match="a has 4 weights in a row, and mean squares of 5 inputs"):
        search_weighted(model, squares={"a.weight": torch.ones(5)})
    with pytest.raises(QATError, match="conv: its inputs hold numbers that are not finite"):
        search_weighted(model, [torch.full((1, 4, 5, 5), torch.nan)])
    model = Net()
    qat.prepare(model, recipe(types=["Linear"], bits=3, granularity="channel", quantizer="absmax"))
    with pytest.raises(QATError, match="reach none"):
        search_weighted(model, pictures())


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**sizes, **heads, "initializer_range": 0.2}))


def write_imatrix(path: Path, squares: dict[str, Tensor], count: int) -> None:
    """As llama-imatrix does: sums and counts, no architecture."""
    import gguf

    writer = gguf.GGUFWriter(path, "", endianess=gguf.GGUFEndian.LITTLE)
    writer.add_type("imatrix")
    for name, value in squares.items():
        writer.add_tensor(f"{name}.in_sum2", (value * count).reshape(1, -1).numpy())
        writer.add_tensor(f"{name}.counts", torch.full((1, 1), float(count)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_an_importance_matrix_of_llama_cpp(recipe: Build, tmp_path: Path) -> None:
    """Below a module of one's own, too; what it lacks keeps its scales."""
    model = nn.Sequential()
    model.net = llama()
    qat.prepare(model, recipe(types=["Linear"], bits=3, granularity="group", group_size=32, quantizer="mse"))
    g = torch.Generator().manual_seed(2)
    down = torch.rand(64, generator=g) ** 4
    write_imatrix(tmp_path / "i.gguf", {"blk.1.ffn_down.weight": down, "blk.7.attn_q.weight": torch.ones(32)}, 24)
    squares = read_imatrix(tmp_path / "i.gguf", model)
    assert list(squares) == ["net.model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(*squares.values(), down)
    rows = {row.name: row for row in search_weighted(model, squares=squares)}
    assert [name for name, row in rows.items() if row.error is not None] == ["net.model.layers.1.mlp.down_proj"]
    layer = qat_layers(model)["net.model.layers.1.mlp.down_proj"]
    quantizer: Any = weight_quantizers(layer)["weight"]
    wanted = search(layer.weight.detach(), quantizer.spec, importance(next(iter(squares.values()))[None], 32))
    assert torch.equal(quantizer.start().scale, wanted.scale)


def test_files_that_cannot_be_read(recipe: Build, tmp_path: Path) -> None:
    model = llama()
    qat.prepare(model, recipe(types=["Linear"], bits=3, granularity="group", group_size=32, quantizer="mse"))
    with pytest.raises(QATError, match="is no GGUF file"):
        read_imatrix(tmp_path / "none.gguf", model)
    (tmp_path / "text.gguf").write_text("not at all")
    with pytest.raises(QATError, match="is no GGUF file"):
        read_imatrix(tmp_path / "text.gguf", model)
    write_imatrix(tmp_path / "other.gguf", {"blk.9.ffn_down.weight": torch.ones(64)}, 2)
    with pytest.raises(QATError, match="no mean squares of this model's inputs"):
        read_imatrix(tmp_path / "other.gguf", model)
    with pytest.raises(QATError, match=r"llama, mistral, mixtral, qwen2, .*not of None"):
        net = Net()
        qat.prepare(net, small(recipe))
        read_imatrix(tmp_path / "other.gguf", net)


def test_squares_are_the_diagonal_of_the_moments(recipe: Build) -> None:
    model = Net()
    qat.prepare(model, small(recipe))
    x = torch.randn(2, 4, 5, 5)
    for name, value in (("conv", x), ("up", torch.randn(2, 6, 3, 3)), ("a", torch.randn(2, 7, 4))):
        both = Moments(), Squares()
        for found in both:
            found.add(qat_layers(model)[name], (value,), {})
        whole, diagonal = (found.mean(qat_layers(model)[name]) for found in both)
        torch.testing.assert_close(whole.diagonal(dim1=1, dim2=2).float(), diagonal.float())
    # rows fall into equal runs, one for each group of channels
    found = importance(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), 4)
    assert torch.equal(found, torch.tensor([[1.0, 3.0], [1.0, 3.0], [5.0, 7.0], [5.0, 7.0]]) / 4)
