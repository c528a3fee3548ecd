"""MLX: what it decodes is what was trained, and mlx-lm runs it.

Mutations that were tried one at a time, and the test that turned red for each:

    zero points left out of the biases           test_mlx_lm_runs_the_trained_weights
    steps of binary not doubled                  test_every_grid_that_is_not_refused
    groups of 64 before those of 128             test_configurations_that_mlx_has_no_code_for
    a tied head stored again                     test_mlx_lm_runs_the_trained_weights
    no layers by name in config.json             test_mlx_lm_runs_the_trained_weights
    no `quantization` in config.json             test_mlx_lm_runs_the_trained_weights
    mxfp4 embeddings allowed in fp32             test_refusals
    overflow in fp16 not looked for              test_a_weight_beyond_fp16_is_refused
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.errors import ExportError, QATError
from qat.export import export
from qat.export.formats.mlx import GROUPS, Mlx, stored_as
from qat.init.file import start_from_file
from qat.layout import Layout
from qat.plan import PlanRow
from qat.qtensor import QTensor
from qat.quantizers import make_quantizer
from qat.specs import QuantSpec
from qat.verify import verify

KEEP_HEAD = {"match": ["lm_head"], "keep_float": True}
BOTH = ("Linear", "Embedding")
IDS = torch.arange(24).reshape(2, 12)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

GRIDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    **{f"int{bits}": (FP32, {"bits": bits}) for bits in (2, 3, 4, 5, 6, 8)},
    "int4, zero points, fp16 scales": (
        FP32,
        {"signed": False, "zero_point": "int", "scale": "fp16", "quantizer": "minmax"},
    ),
    "int4, float minima, groups of 64": (
        FP32,
        {"signed": False, "zero_point": "float", "group_size": 64, "quantizer": "minmax"},
    ),
    "int8 by row": (FP32, {"bits": 8, "granularity": "channel", "group_size": None, "narrow": True}),
    "int3 in fp16": (FP16, {"bits": 3}),
    "int3 with minima in fp16": (FP16, {"bits": 3, "signed": False, "zero_point": "float", "quantizer": "minmax"}),
    "int4 by powers of two in bf16": (BF16, {"scale": "e8m0"}),
    "ternary in bf16": (BF16, {"grid": "ternary", "bits": 2, "quantizer": "absmean"}),
    "ternary in fp16": (FP16, {"grid": "ternary", "bits": 2, "quantizer": "absmean", "group_size": 64}),
    "binary in bf16": (BF16, {"grid": "binary", "bits": 1, "quantizer": "mse"}),
    "seq": (FP32, {"grid": "seq", "bits": 2, "quantizer": "lsq"}),
    "mxfp4 in bf16": (BF16, {"grid": "fp4", "scale": "e8m0"}),
    "mxfp8 in bf16": (BF16, {"grid": "e4m3", "bits": 8, "scale": "e8m0"}),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()  # type: ignore[no-any-return]


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def torch_of(array: Any) -> torch.Tensor:
    mx = pytest.importorskip("mlx.core")
    return torch.tensor(memoryview(array.astype(mx.float32)).tolist())


def served(folder: Path) -> tuple[Any, torch.Tensor]:
    """(the model of mlx-lm, its logits)."""
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    mx.set_default_device(mx.cpu)
    model, _ = utils.load_model(folder)
    return model, torch_of(model(mx.array(IDS.tolist())))


def assert_same_weights(loaded: Any, bundle: Any) -> None:
    mx = pytest.importorskip("mlx.core")
    from mlx.utils import tree_flatten

    modules, state = dict(loaded.named_modules()), dict(tree_flatten(loaded.parameters()))
    for name, trained in bundle.items():
        layer = modules[name.rpartition(".")[0]]
        found = mx.dequantize(
            layer.weight,
            layer.scales,
            layer.biases,
            group_size=layer.group_size,
            bits=layer.bits,
            mode=layer.mode,
            dtype=getattr(mx, str(trained.out_dtype)[6:]),
        )
        assert torch.equal(torch_of(found), trained.dequantize().float()), name
    for name, value in bundle.floats.items():
        assert torch.equal(torch_of(state[name]), value.float()), name


@pytest.mark.consumer
@pytest.mark.parametrize("name", sorted(GRIDS))
def test_mlx_lm_runs_the_trained_weights(name: str, make_model: Any, quantize: Any, ran: Any, tmp_path: Path) -> None:
    pytest.importorskip("mlx", reason="MLX is not installed")
    dtype, weight = GRIDS[name]
    model = make_model(dtype=dtype, intermediate_size=128, attention_bias=True, tie_word_embeddings=True)
    bundle = quantize(model, {"bits": 4, **weight}, BOTH)
    receipt = export(bundle, tmp_path / "out", "mlx")
    assert receipt.reader.startswith("mlx 0.") and receipt.max_abs_diff == 0.0
    loaded, theirs = served(tmp_path / "out")
    assert_same_weights(loaded, bundle)
    ours = logits(model)
    away = kl(ours, theirs)
    # activations of a 16-bit model are rounded in another order
    assert away < (1e-9 if dtype == FP32 else 2e-3)
    if dtype == FP32:
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=2e-4)
    ran("mlx", "mlx-lm", name, kl=away)
    verify(tmp_path / "out")


@pytest.mark.consumer
def test_mixed_layers_a_float_head_and_its_own_tokenizer(
    make_model: Any, quantize: Any, tokenizer: Any, tmp_path: Path
) -> None:
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    load = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed").load
    own = {"granularity": "group", "group_size": 64, "quantizer": "absmax"}
    rules = {
        "v": {"match": ["*v_proj"], "weight": {**own, "bits": 6}},
        "down": {"match": ["*down_proj"], "weight": {**own, "group_size": 128, "bits": 8}},
        "up": {"match": ["*.0.*up_proj"], "keep_float": True},
        "gate": {
            "match": ["*gate_proj"],
            "weight": {**own, "group_size": 32, "bits": 4, "grid": "fp4", "scale": "e8m0"},
        },
    }
    model = make_model(intermediate_size=128)
    bundle = quantize(model, {"bits": 4}, BOTH, head=KEEP_HEAD, **rules)
    export(bundle, tmp_path / "out", "mlx", tokenizer=tokenizer)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    said = config["quantization"]
    assert said == config["quantization_config"]
    assert {key: said[key] for key in ("group_size", "bits", "mode")} == {"group_size": 32, "bits": 4, "mode": "affine"}
    assert said["model.layers.1.self_attn.v_proj"] == {"group_size": 64, "bits": 6, "mode": "affine"}
    assert said["model.layers.0.mlp.gate_proj"] == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert len(said) == 3 + 6
    loaded, words = load(str(tmp_path / "out"))
    assert_same_weights(loaded, bundle)
    assert words.encode("for i in range") == tokenizer.encode("for i in range")
    mx.set_default_device(mx.cpu)
    theirs = torch_of(loaded(mx.array(IDS.tolist())))
    assert kl(logits(model), theirs) < 1e-9


def cases() -> Iterator[QuantSpec]:
    """Every grid and every way of storing its scales, in the groups of MLX and in larger ones."""
    kinds = [("int", bits) for bits in range(1, 9)] + [
        ("ternary", 2), ("binary", 1), ("seq", 2), ("fp4", 4), ("e4m3", 8), ("e5m2", 8), ("nf4", 4),
    ]  # fmt: skip
    where = [("group", 32), ("group", 64), ("group", 128), ("group", 256), ("channel", None), ("tensor", None)]
    axes = itertools.product(kinds, ("none", "int", "float"), ("portable", "bf16", "fp16", "fp32", "e8m0"), where)
    for (kind, bits), zero, scale, (granularity, size) in axes:
        for signed, narrow, either in ((1, 0, 0), (1, 1, 0), (0, 0, 0), (1, 0, 1)):
            quantizer = "mse" if zero == "none" else "minmax"
            spec = QuantSpec(
                bits, bool(signed), bool(narrow), granularity, size, zero, scale, quantizer, kind, bool(either)
            )
            if not spec.reasons():
                yield spec


@pytest.mark.consumer
def test_every_grid_that_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In each dtype of a model that is said to hold it: MLX, our own reading and `unpack` give the trained weight."""
    pytest.importorskip("mlx", reason="MLX is not installed")
    monkeypatch.setattr("qat.quantizers.mse.CANDIDATES", 4)
    fmt, layout, count = Mlx(), Layout((3, 256)), {FP32: 0, BF16: 0, FP16: 0}
    for number, spec in enumerate(cases()):
        if fmt.row_reasons(row(spec)):
            continue
        for dtype in fmt.holds(spec):
            w = torch.randn(3, 256, generator=torch.Generator().manual_seed(number)).to(dtype)
            quantizer = make_quantizer(spec, layout)
            quantizer.init_from(w)
            trained = quantizer.integers(w)
            packed = fmt.pack("x.weight", trained, dtype)
            wanted = trained.dequantize()
            assert torch.equal(fmt.weight("x", packed, config_of(spec, dtype)), wanted), (spec, dtype)
            assert torch.equal(fmt.unpack(packed, spec, layout, dtype).dequantize(), wanted), (spec, dtype)
            with monkeypatch.context() as patch:
                patch.setattr(Mlx, "installed", lambda self: False)
                assert torch.equal(fmt.weight("x", packed, config_of(spec, dtype)), wanted), (spec, dtype)
            count[dtype] += 1
    assert count[FP32] > 800 and count[BF16] > 150 and count[FP16] > 150, count


def row(spec: QuantSpec, columns: int = 256, **changes: Any) -> PlanRow:
    given = {"type": "Linear", "input": None, "kinds": {"weight": "linear"}, **changes}
    return PlanRow("x", given["type"], "r", spec, given["input"], 3 * columns, given["kinds"], columns)


def config_of(spec: QuantSpec, dtype: torch.dtype = FP32, columns: int = 256) -> dict[str, Any]:
    said = stored_as(spec, columns)
    found = {"group_size": said.group, "bits": said.bits, "mode": said.mode}
    return {"quantization": found, "quantization_config": found, "dtype": str(dtype)[6:]}


@pytest.mark.consumer
def test_what_16_bits_do_not_hold_would_be_other_weights() -> None:
    """The limits of `holds` are where MLX's own roundings begin: one bit more, and weights differ."""
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    assert mx is not None
    fmt, layout = Mlx(), Layout((64, 256))
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    for bits, scale, dtype, fits in (
        (3, "portable", FP16, True),
        (4, "portable", FP16, False),
        (2, "fp16", FP16, False),
        (2, "portable", BF16, False),
        (6, "e8m0", BF16, True),
        (8, "e8m0", BF16, True),
        (8, "fp16", FP32, True),
        (8, "fp32", FP32, False),
    ):
        spec = QuantSpec(bits, granularity="group", group_size=32, scale=scale)
        assert (dtype in fmt.holds(spec)) == fits
        trained = make_quantizer(spec, layout).integers(w.to(dtype))
        fmt_pack = fmt.pack("x.weight", trained, dtype) if fits else _forced(trained, dtype)
        assert torch.equal(fmt.weight("x", fmt_pack, config_of(spec)), trained.dequantize()) == fits, (bits, scale)


def _forced(trained: QTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Scales and biases rounded to `dtype`, as a writer would store them that does not ask."""
    ones = {"scale": trained.scale * 0 + 1, "spec": replace(trained.spec, scale="portable")}
    packed = Mlx().pack("x.weight", QTensor(**{**vars(trained), **ones}))
    first = trained.spec.int_grid.qmin
    scale = trained.scale.float()
    return {**packed, "scales": scale.to(dtype), "biases": (first * scale).to(dtype)}


# By hand, from the layout in the format's docstring.
def test_golden_layers() -> None:
    codes = torch.arange(32).reshape(1, 32).remainder(8).to(torch.int8) - 4
    three = QTensor(
        codes, torch.tensor([[0.75]]).bfloat16(), None, None,
        QuantSpec(3, granularity="group", group_size=32, scale="bf16"), Layout((1, 32)), FP32,
    )  # fmt: skip
    packed = Mlx().pack("x.weight", three)
    # 0 1 2 3 4 5 6 7, three bits each from the lowest: 0b111_110_101_100_011_010_001_000
    octet = [0x88, 0xC6, 0xFA]
    assert packed["weight"].dtype == torch.uint32 and packed["weight"].shape == (1, 3)
    assert packed["weight"].view(torch.uint8).flatten().tolist() == octet * 4
    assert packed["scales"].tolist() == [[0.75]] and packed["biases"].tolist() == [[-3.0]]
    unsigned = QuantSpec(4, False, False, "group", 64, "int", "portable", "minmax")
    codes = torch.arange(128).reshape(1, 128).remainder(16).to(torch.uint8)
    zero = torch.tensor([[5, 0]], dtype=torch.int16)
    four = QTensor(codes, torch.tensor([[0.5, 2.0]]).bfloat16(), zero, None, unsigned, Layout((1, 128)), FP32)
    packed = Mlx().pack("x.weight", four, FP16)
    assert packed["weight"].view(torch.uint8).flatten().tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 8
    assert packed["scales"].dtype == FP16 and packed["scales"].tolist() == [[0.5, 2.0]]
    assert packed["biases"].tolist() == [[-2.5, 0.0]]
    signs = torch.tensor([[1, 0, 0, 0, 1, 1, 0, 1] * 8], dtype=torch.uint8)
    spec = QuantSpec(1, granularity="channel", kind="binary", quantizer="mse")
    one = QTensor(signs, torch.tensor([[0.25]]).bfloat16(), None, None, spec, Layout((1, 64)), BF16)
    packed = Mlx().pack("x.weight", one)
    assert packed["weight"].view(torch.uint8).flatten().tolist() == [0b10110001] * 8
    assert packed["scales"].tolist() == [[0.5]] and packed["biases"].tolist() == [[-0.25]]
    spec = QuantSpec(4, kind="fp4", granularity="channel", scale="e8m0")
    codes = torch.arange(64).reshape(1, 64).remainder(16).to(torch.uint8)
    scale = torch.tensor([[125]], dtype=torch.uint8).view(spec.scale_grid.dtype)
    packed = Mlx().pack("x.weight", QTensor(codes, scale, None, None, spec, Layout((1, 64)), BF16))
    # one for the row, in groups of 32
    assert packed["scales"].tolist() == [[125, 125]] and set(packed) == {"weight", "scales"}
    assert packed["weight"].view(torch.uint8).flatten().tolist()[:2] == [0x10, 0x32]


def test_refusals(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    def reasons(columns: int = 256, given: dict[str, Any] | None = None, **words: Any) -> str:
        return "; ".join(Mlx().row_reasons(row(QuantSpec(**words), columns, **(given or {}))))

    g32: dict[str, Any] = {"granularity": "group", "group_size": 32}
    assert not reasons(**g32) and not reasons(granularity="channel")
    assert not reasons(given={"type": "Embedding", "kinds": {"weight": "embedding"}}, **g32)
    assert "bits=7: mlx has 1, 2, 3, 4, 5, 6 and 8; nearest: bits: 8" in reasons(bits=7, **g32)
    assert "group_size=16: mlx has groups of 32, 64 and 128" in reasons(granularity="group", group_size=16)
    assert "rows of 48 numbers" in reasons(48, granularity="channel")
    assert "grid nf4: mlx has steps of equal size" in reasons(kind="nf4", **g32)
    assert "grid e5m2: mlx has steps of equal size" in reasons(bits=8, kind="e5m2", **g32)
    assert "scale=portable with grid fp4: mlx has mxfp4 only; use scale: e8m0" in reasons(kind="fp4", **g32)
    nvfp4: dict[str, Any] = {"kind": "fp4", "granularity": "group", "group_size": 16, "scale": "nvfp4"}
    assert "use scale: e8m0, group_size: 32" in reasons(**nvfp4)
    assert "scale=fp32: mlx rounds scale * code" in reasons(scale="fp32", **g32)
    assert "set input: null" in reasons(given={"input": QuantSpec(8, granularity="token")}, **g32)
    assert "not Conv2d; add a rule" in reasons(given={"type": "Conv2d", "kinds": {"weight": "conv"}}, **g32)
    fp4 = {"grid": "fp4", "bits": 4, "scale": "e8m0"}
    bundles = {
        r"q_proj.weight \(int8 g32 portable absmax\) in a model in torch.bfloat16: mlx rounds": quantize(
            make_model(dtype=BF16), {}
        ),
        r"embed_tokens.weight: mlx looks mxfp4 embeddings up in bfloat16, and the model is in torch.float32": quantize(
            make_model(), fp4, BOTH
        ),
        r"\(fp4 g32 e8m0 absmax\) in a model in torch.float16: mlx rounds": quantize(make_model(dtype=FP16), fp4),
        "has no transformers config": quantize(torch.nn.Sequential(torch.nn.Linear(64, 4)), {}),
    }
    for words, bundle in bundles.items():
        with pytest.raises(ExportError, match=words) as problem:
            export(bundle, tmp_path / "out", "mlx")
        assert "the dtype of stored scales" not in str(problem.value)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_beyond_fp16_is_refused() -> None:
    spec = QuantSpec(3, granularity="group", group_size=32)
    codes = torch.full((1, 32), 3, dtype=torch.int8)
    for scale, words in ((12032.0, "leaves the range"), (2.0**-20 * (1 + 2**-7), "would be rounded")):
        scales = torch.tensor([[scale]]).bfloat16()
        weight = QTensor(codes, scales, None, None, spec, Layout((1, 32)), FP16)
        with pytest.raises(ExportError, match=words):
            Mlx().pack("x.weight", weight, FP16)
        assert Mlx().pack("x.weight", weight)["scales"].dtype == FP32


def test_our_own_unpacking_reads_the_same(
    make_model: Any, quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mlx, "installed", lambda self: False)
    for name, (dtype, weight) in GRIDS.items():
        model = make_model(num_hidden_layers=1, intermediate_size=128, dtype=dtype)
        folder = tmp_path / name.replace(" ", "_")
        export(quantize(model, {"bits": 4, **weight}, head=KEEP_HEAD), folder, "mlx")
        assert {found.reader for found in verify(folder)} == {"qat"}


@pytest.mark.parametrize("name", ["int4", "int4, float minima, groups of 64", "mxfp8 in bf16"])
def test_training_starts_from_a_folder(name: str, make_model: Any, quantize: Any, tmp_path: Path) -> None:
    dtype, weight = GRIDS[name]
    words = {"bits": 4, **weight, "quantizer": "lsq"}
    trained = quantize(make_model(dtype=dtype, intermediate_size=128), words, head=KEEP_HEAD)
    export(trained, tmp_path / "out", "mlx")
    model = make_model(intermediate_size=128)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    bundle = quantize(model, words, head=KEEP_HEAD)
    assert sorted(start_from_file(model, tmp_path / "out")) == sorted(bundle)
    for layer, ours in bundle.items():
        assert torch.equal(ours.dequantize().to(dtype), trained[layer].dequantize()), layer
    other = make_model(intermediate_size=128)
    quantize(other, {**words, "grid": "int", "bits": 3, "scale": "portable"}, head=KEEP_HEAD)
    with pytest.raises(QATError, match="is not on the grid of its rule"):
        start_from_file(other, tmp_path / "out")


@pytest.mark.consumer
def test_a_folder_that_mlx_quantized_itself_is_read(make_model: Any, tmp_path: Path) -> None:
    """Negative scales and all; as its own `dequantize` has it, by our own code too."""
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    fmt = Mlx()
    w = torch.randn(4, 128, generator=torch.Generator().manual_seed(3))
    for mode, bits, group in (("affine", 4, 64), ("affine", 3, 128), ("mxfp4", 4, 32), ("mxfp8", 8, 32)):
        with mx.stream(mx.cpu):
            theirs = mx.quantize(mx.array(w.tolist()), group, bits, mode)
            wanted = torch_of(mx.dequantize(*theirs, group_size=group, bits=bits, mode=mode, dtype=mx.float32))
            mx.save_safetensors(str(tmp_path / "model"), {
                f"a.{key}": array for key, array in zip(("weight", "scales", "biases"), theirs, strict=False)
            })  # fmt: skip
        said = {"group_size": group, "bits": bits, "mode": mode}
        config = {"quantization": said, "quantization_config": said, "dtype": "float32"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert fmt.knows(tmp_path)
        for own in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                if own:
                    patch.setattr(Mlx, "installed", lambda self: False)
                ((name, found),) = list(fmt.read(tmp_path))
            assert name == "a.weight" and torch.equal(found, wanted), (mode, bits, own)


@pytest.mark.parametrize("own", [False, True], ids=["consumer", "own"])
def test_damaged_files(
    own: bool, make_model: Any, quantize: Any, attack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not own:
        pytest.importorskip("mlx", reason="its own reading is covered by the other case")
    for name in ("int4", "ternary in bf16", "mxfp4 in bf16"):
        dtype, weight = GRIDS[name]
        model = make_model(dtype=dtype, num_hidden_layers=1, intermediate_size=64)
        export(quantize(model, {"bits": 4, **weight}, head=KEEP_HEAD), tmp_path / name, "mlx")
        with monkeypatch.context() as patch:
            if own:
                patch.setattr(Mlx, "installed", lambda self: False)
            outcomes = attack(Mlx(), tmp_path / name, 6)
        assert outcomes.total() == 48 and outcomes["refused"] > 15 and outcomes["noticed"] > 5, outcomes


def test_configurations_that_mlx_has_no_code_for(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    model = make_model(num_hidden_layers=1, intermediate_size=64)
    export(quantize(model, {"bits": 4}, head=KEEP_HEAD), tmp_path, "mlx")
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    for change in (
        {"bits": 7}, {"bits": True}, {"bits": "4"}, {"bits": None}, {"group_size": 16}, {"group_size": 64},
        {"mode": "nvfp4"}, {"mode": ["affine"]}, {"mode": "mxfp4"}, {"bits": 8},
        {"model.layers.0.mlp.up_proj": False}, {"model.layers.0.mlp.up_proj": {"bits": 4}},
    ):  # fmt: skip
        said = {**good["quantization"], **change}
        path.write_text(json.dumps({**good, "quantization": said, "quantization_config": said}))
        with pytest.raises(ExportError):
            list(Mlx().read(tmp_path))
    path.write_text(json.dumps({**good, "quantization": {"bits": 4}}))
    with pytest.raises(ExportError, match="that is not its `quantization_config`"):
        list(Mlx().read(tmp_path))
    assert GROUPS == (128, 64, 32)
