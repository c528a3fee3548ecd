"""Training on llama.cpp's k-quants, and what llama.cpp computes with the files: benchmarks/results/kquants.json.

    python -m benchmarks.kquants                   three seeds, about 25 minutes on one thread
    python -m benchmarks.kquants --seeds 0 --fast  does it run? nothing is written without --out

The demo's language model (`qat.tasks.demo`), one block of width 256 since a super-block is 256 numbers of a row, and
for each of Q4_K, Q3_K and Q2_K (embeddings and head Q6_K throughout) three files of one architecture:

    llama.cpp, importance matrix   the float model, rounded by llama.cpp's own quantizer; importance: the mean square of
                                   each input on the batches that training begins with, what llama-imatrix collects
    qat on Q4_0, then llama.cpp    trained on Q4_0 by the preset's recipe, then rounded to the type in the same way
    qat                            trained on the type itself and exported

kl is that of llama.cpp's predictions on each file from the float model's in torch, on held-out blocks. All trainings
take the same steps on the same batches at the same learning rate, which was not tuned for any of them.
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

import qat
from benchmarks.common import RESULTS, Row, environment, row, save, verdict
from benchmarks.quality.ptq import importance, super_blocks
from qat.callbacks import DistillationCallback, ExportCallback, QATCallback
from qat.export import gguf_model
from qat.export.formats.gguf import FILE
from qat.recipes import load_recipe
from qat.recipes.schema import Recipe
from qat.tasks.demo import FAST, FULL, Demo, Settings, hush
from qat.tasks.measure import compare, evenly, log_probs
from qat.tasks.progress import stages

SUITE = "kquants"
WIDE = {"hidden": 256, "inner": 512, "layers": 1}
RATE = 3e-4
CALIBRATION = 16
OURS, OWN, AGAIN = "qat", "llama.cpp, importance matrix", "qat on Q4_0, then llama.cpp"
_WEIGHT = "rules.linears.weight"
_SIGNED = (f"{_WEIGHT}.zero_point=none", f"{_WEIGHT}.signed=true", f"{_WEIGHT}.signed_scale=true")
# type -> what the preset w4_gguf_q4_k is changed by
TYPES: dict[str, tuple[str, ...]] = {
    "Q4_K": (),
    "Q3_K": (f"{_WEIGHT}.bits=3", f"{_WEIGHT}.group_size=16", f"{_WEIGHT}.scale=q3_k", *_SIGNED),
    "Q2_K": (f"{_WEIGHT}.bits=2", f"{_WEIGHT}.group_size=16", f"{_WEIGHT}.scale=q2_k"),
}
_Q4_0 = (f"{_WEIGHT}.scale=portable", *_SIGNED)
_SIX_BITS = "Q6_K"


class KQuants(Demo):
    """One seed."""

    def kls(self) -> dict[tuple[str, str], float]:
        """(type, tool) -> kl."""
        self.corpus, self.tokenizer, self.train, held_out = self.data()
        self.held_out = evenly(held_out, self.settings.held_out_blocks)
        self.float_model, _ = self.pretrain()
        self.reference = list(log_probs(self.float_model, self.held_out))
        q4_0, four_bits = self.trained("Q4_0", _Q4_0)
        found = {}
        for kind, changes in TYPES.items():
            folder, _ = self.trained(kind, changes)
            found[kind, OURS] = self.kl(folder / FILE)
            for tool, model, source in ((OWN, self.float_model, None), (AGAIN, four_bits, q4_0 / FILE)):
                path = self.out / f"{kind}-{tool}.gguf"
                shutil.copyfile(folder / FILE, path)
                rewrite(path, model, self.rounded(kind, model, source is None), source)
                found[kind, tool] = self.kl(path)
            print("  ".join(f"{tool}: {found[kind, tool]:.5f}" for tool in (OWN, AGAIN, OURS)), kind, flush=True)
        return found

    def trained(self, name: str, changes: tuple[str, ...]) -> tuple[Path, nn.Module]:
        """The exported folder, and the float network with the exported numbers."""
        settings = [*changes, f"train.lr={RATE}", f"train.max_steps={self.settings.extra_steps}"]
        recipe: Recipe = load_recipe("w4_gguf_q4_k", settings)
        folder, model = self.out / name, copy.deepcopy(self.float_model)
        export = ExportCallback(str(folder), format="gguf", tokenizer=self.tokenizer, overwrite=True)
        callbacks = [QATCallback(recipe), DistillationCallback(), export]
        bundle = qat.convert(self.fit(model, name, self.settings.extra_steps, RATE, callbacks))
        plain = copy.deepcopy(self.float_model)
        plain.load_state_dict({**bundle.floats, **{name: tensor.dequantize() for name, tensor in bundle.items()}})
        return folder, plain

    def rounded(self, kind: str, model: nn.Module, six_bits: bool) -> dict[str, Tensor]:
        """Parameter -> the bytes of its blocks, uint8 [O, n], by llama.cpp; embedding and head only with `six_bits`."""
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        batch = self.settings.batch
        batches = [self.train[at : at + batch] for at in range(0, CALIBRATION * batch, batch)]
        means = importance(layers, lambda: [model(input_ids=ids) for ids in batches])
        found = {}
        for name, layer in layers.items():
            if name != "lm_head" or six_bits:
                found[f"{name}.weight"] = super_blocks(
                    _SIX_BITS if name == "lm_head" else kind, layer.weight, means[name]
                )
        if six_bits:
            table = model.get_input_embeddings().weight  # type: ignore[operator]
            found["model.embed_tokens.weight"] = super_blocks(_SIX_BITS, table, torch.ones(table.shape[1]))
        return found

    def kl(self, file: Path) -> float:
        """Of llama.cpp on the file from the float model."""
        served, _ = self.llama_cpp(file.parent) if file.name == FILE else self.alone(file)
        return compare(self.reference, served, self.held_out).kl

    def alone(self, file: Path) -> tuple[list[Tensor], list[str]]:
        """`llama_cpp` of a file that is not alone in its folder."""
        with tempfile.TemporaryDirectory() as folder:
            shutil.copyfile(file, Path(folder) / FILE)
            return self.llama_cpp(Path(folder))


def rewrite(path: Path, model: Any, blocks: dict[str, Tensor], source: Path | None) -> None:
    """Put other numbers into a GGUF file of a Llama: blocks where they are given, else what `source` has of a tensor,
    else (norms) the model's own."""
    import gguf

    config = model.config
    table = gguf_model.name_table("llama", config.num_hidden_layers)
    reader = gguf.GGUFReader(path, "r+")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    others = {} if source is None else {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    for name, parameter in model.state_dict().items():
        (stored,) = gguf_model.gguf_names(table, name)
        heads = gguf_model.heads_to_pair("llama", config.num_attention_heads, config.num_key_value_heads, name)
        if name in blocks:
            rows = gguf_model.pair_rows(blocks[name], heads) if heads else blocks[name]
            tensors[stored].data[:] = rows.numpy()
        elif others:
            assert others[stored].tensor_type == tensors[stored].tensor_type, f"{stored} is of another type"
            tensors[stored].data[:] = others[stored].data
        else:
            tensors[stored].data[:] = parameter.numpy()
    reader.data.flush()


def rows_of(found: dict[int, dict[tuple[str, str], float]]) -> list[Row]:
    """Means and spreads, single seeds, and ours over each of the others (goal: below it for every seed)."""
    rows: list[Row] = []
    for kind in TYPES:
        for tool in (OWN, AGAIN, OURS):
            each = {seed: kls[kind, tool] for seed, kls in found.items()}
            rows.append(row(SUITE, kind, tool, "kl", statistics.fmean(each.values())))
            rows += [{**row(SUITE, kind, tool, "kl", value), "suite": f"{SUITE} seed {s}"} for s, value in each.items()]
            if len(each) > 1:
                rows.append(
                    row(f"{SUITE} spread", kind, tool, "kl, standard deviation", statistics.stdev(each.values()))
                )
        for tool in (OWN, AGAIN):
            worst = max(kls[kind, OURS] / kls[kind, tool] for kls in found.values())
            rows.append(row(f"{SUITE} goals", kind, OURS, f"kl / {tool}, largest of the seeds", worst, 1.0))
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kquants", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fast", action="store_true", help="a few steps: does it run?")
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    hush()
    settings: Settings = replace(FAST if options.fast else FULL, **WIDE)
    found = {}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder, stages(None) as progress:
            found[seed] = KQuants(settings, Path(folder), seed, progress).kls()
    rows = rows_of(found)
    out = options.out or (None if options.fast else RESULTS / f"{SUITE}.json")
    if out is not None:
        save(out, environment(seeds=" ".join(map(str, options.seeds)), rate=RATE, steps=settings.extra_steps), rows)
    print(*(f"{r['case']} {r['tool']} {r['metric']} {r['value']:.5g}" for r in rows if r["suite"] == SUITE), sep="\n")
    # a few steps say nothing about goals
    print(f"{len(rows)} rows" if options.fast else verdict(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
