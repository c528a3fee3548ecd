"""A packed folder as the start of a training: step 0 is the file.

Mutations that were tried one at a time, and the test that turned red for each:

    scales not stored / weights not copied          test_step_0_is_the_file
    float tensors not copied                        test_step_0_is_the_file
    the weight not compared with the reader's       test_what_does_not_belong_together
    `search_scales` undoes it at the next start     test_the_start_is_kept
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qat
from qat.errors import QATError
from qat.export import export
from qat.init.file import start_from_file

HEAD = {"match": ["lm_head"], "keep_float": True}
BY_ROW = {"granularity": "channel", "group_size": None}
GRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("compressed-tensors", {"bits": 4}),
    "int3 by row": ("compressed-tensors", {"bits": 3, **BY_ROW}),
    "ternary": ("compressed-tensors", {"grid": "ternary", "bits": 2}),
    "uint4": ("compressed-tensors", {"bits": 4, "zero_point": "int"}),
    "int8 by tensor": ("compressed-tensors", {"bits": 8, "granularity": "tensor", "group_size": None}),
    "fp8": ("compressed-tensors", {"grid": "e4m3", "bits": 8, **BY_ROW}),
    "mxfp4": ("compressed-tensors", {"grid": "fp4", "bits": 4, "scale": "e8m0"}),
    "nvfp4": ("compressed-tensors", {"grid": "fp4", "bits": 4, "scale": "nvfp4_portable", "group_size": 16}),
    "nf4": ("bitsandbytes", {"grid": "nf4", "bits": 4, "scale": "fp32"}),
    "bnb fp4": ("bitsandbytes", {"grid": "bnb_fp4", "bits": 4}),
    "bnb int8": ("bitsandbytes", {"bits": 8, "narrow": True, **BY_ROW}),
    "exl2": ("exl2", {"bits": 4, "scale": "exl2"}),
    "modelopt int4": ("modelopt", {"bits": 4}),
    "modelopt nvfp4": ("modelopt", {"grid": "fp4", "bits": 4, "scale": "nvfp4_portable", "group_size": 16}),
}
IDS = torch.randint(0, 320, (2, 12), generator=torch.Generator().manual_seed(1))


def another(model: torch.nn.Module) -> torch.nn.Module:
    """The same architecture, other weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


CASES = [
    *((name, torch.float32, False, "lsq") for name in sorted(GRIDS)),
    ("int4", torch.bfloat16, True, "mse"),
    ("uint4", torch.bfloat16, False, "lsq"),
    ("int8 by tensor", torch.float16, False, "lsq"),
]


@pytest.mark.parametrize(("name", "dtype", "tied", "quantizer"), CASES, ids=str)
def test_step_0_is_the_file(
    name: str, dtype: torch.dtype, tied: bool, quantizer: str, make_model: Any, quantize: Any, tmp_path: Path
) -> None:
    fmt, weight = GRIDS[name]
    source = quantize(make_model(dtype=dtype, tie_word_embeddings=tied), {**weight, "quantizer": "mse"}, head=HEAD)
    export(source, tmp_path / "out", fmt)
    model = another(make_model(dtype=dtype, tie_word_embeddings=tied))
    bundle = quantize(model, {**weight, "quantizer": quantizer}, head=HEAD)
    with torch.no_grad():
        wanted = source.module(IDS).logits
        assert not torch.equal(bundle.module(IDS).logits, wanted)
        taken = start_from_file(model, tmp_path / "out")
        assert sorted(taken) == sorted(source)
        assert torch.equal(bundle.module(IDS).logits, wanted)
    for key, trained in bundle.items():
        assert torch.equal(trained.codes, source[key].codes), key
        assert torch.equal(trained.scale, source[key].scale), key


def test_the_start_is_kept(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    """`initialize` would search scales of weights that changed, which are others."""
    source = quantize(make_model(), {"bits": 2, "quantizer": "mse"}, head=HEAD)
    export(source, tmp_path / "out", "compressed-tensors")
    model = another(make_model())
    bundle = quantize(model, {"bits": 2, "quantizer": "lsq"}, head=HEAD)
    start_from_file(model, tmp_path / "out")
    qat.initialize(model)
    assert all(torch.equal(bundle[key].scale, source[key].scale) for key in source)
    before = {key: tensor.codes.clone() for key, tensor in bundle.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
    model.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()
    qat.after_optimizer_step(model, optimizer)
    assert any(not torch.equal(bundle[key].codes, before[key]) for key in before), "it does not train"


def edited(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_what_does_not_belong_together(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    def refused(words: str, weight: dict[str, Any], folder: Path = tmp_path / "out", **more: Any) -> None:
        model = make_model(**more)
        quantize(model, {"quantizer": "mse", **weight}, head=HEAD)
        with pytest.raises(QATError, match=words) as problem:
            start_from_file(model, folder)
        assert "\n" not in str(problem.value)

    export(quantize(make_model(), {"bits": 4}, head=HEAD), tmp_path / "out", "compressed-tensors")
    refused("is not on the grid of its rule, int4 channel", {"bits": 4, **BY_ROW})
    refused("is not on the grid of its rule, int4 g16", {"bits": 4, "group_size": 16})
    refused("is not on the grid of its rule, int3 g32", {"bits": 3})
    refused("is not on the grid of its rule, uint4 g32 zp", {"bits": 4, "zero_point": "int"})
    refused("absmax' finds its own scales; use mse or lsq", {"bits": 4, "quantizer": "absmax"})
    refused(r"mlp.down_proj.weight is \[64, 96\], the model's is \[64, 128\]", {"bits": 4}, intermediate_size=128)
    refused("which LlamaForCausalLM lacks; is it another model", {"bits": 4}, num_hidden_layers=1)
    refused("lacks model.layers.2.*; is it another model", {"bits": 4}, num_hidden_layers=3)
    refused("folder of none of the formats", {"bits": 4}, tmp_path)
    model = make_model()
    quantize(model, {"bits": 4, "quantizer": "mse"}, types=("Embedding",))
    with pytest.raises(QATError, match=r"embed_tokens\.weight is in float, and a rule quantizes it"):
        start_from_file(model, tmp_path / "out")
    model = make_model()
    quantize(model, {"bits": 4, "quantizer": "mse"}, head={"match": ["lm_head", "*down_proj"], "keep_float": True})
    with pytest.raises(QATError, match=r"down_proj\.weight is quantized, and no rule of the recipe gives it a grid"):
        start_from_file(model, tmp_path / "out")
    refused("int4 g32 portable mse; the recipe has to name", {"bits": 4}, edited(tmp_path / "out", _odd_scales))


def _odd_scales(tensors: dict[str, torch.Tensor]) -> None:
    """Scales that are no numbers of bf16."""
    for key in tensors:
        if key.endswith("weight_scale"):
            tensors[key] *= 1.001
