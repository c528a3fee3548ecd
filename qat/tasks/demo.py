"""The whole path in a few minutes on two CPU cores: `python -m qat.tasks.demo`.

A small Llama is trained on the source text of Python's standard library. Then, on the same held-out files and against
the same float model: training on in float, rounding to the nearest code (scales searched for least squared error, no
training), and quantization-aware training distilled from the float model, at 4 bits (GGUF's Q4_0) and at 2 bits. Both
trained models are exported, and read back by llama.cpp and by transformers.

    runs/demo/report.html    tables and plots          runs/demo/4bit/    GGUF for llama.cpp
    runs/demo/results.json   the same figures          runs/demo/2bit/    compressed-tensors for transformers
    runs/demo/float/         the float model, a folder that `qat train ... train.model=` takes
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import shutil
import sys
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import qat
from qat.callbacks import DistillationCallback, ExportCallback, QATCallback
from qat.export.llama_cpp import LlamaCpp
from qat.recipes import from_dict, load_recipe
from qat.recipes.schema import Recipe, Train
from qat.tasks.causal_lm import CausalLM
from qat.tasks.demo_report import print_table, save_results
from qat.tasks.flavour import lightning
from qat.tasks.measure import Scores, compare, evenly, greedy, log_probs, output_errors
from qat.tasks.progress import Curve, StageBar, stages
from qat.tasks.stdlib import END, Corpus, read_corpus, token_blocks, train_tokenizer

L = lightning()


@dataclass(frozen=True)
class Settings:
    """Sizes and lengths; `FAST` is for trying whether it runs, its figures mean nothing."""

    hidden: int = 128
    inner: int = 384
    layers: int = 3
    heads: int = 4
    vocab: int = 1024
    context: int = 128
    batch: int = 16
    float_steps: int = 600
    float_lr: float = 4e-3
    extra_steps: int = 180
    lr_4bit: float = 3e-4
    lr_2bit: float = 1e-3
    held_out_blocks: int = 256
    watched_blocks: int = 16
    corpus_limit: int | None = None
    completion_tokens: int = 40


FULL = Settings()
FAST = replace(
    FULL, layers=1, vocab=512, context=64, batch=8, float_steps=12, extra_steps=6, held_out_blocks=16, watched_blocks=4,
    corpus_limit=1_500_000, completion_tokens=8,
)  # fmt: skip
PROMPTS = (
    "import os\nimport sys\n\ndef ",
    "class Error(Exception):\n    ",
    "    def __init__(self, ",
    "for i in range(",
)


@dataclass(frozen=True)
class Case:
    """One width: its recipe, where the export goes, and the program that reads it."""

    name: str
    folder: str
    format: str
    reader: str
    recipe: Recipe


@dataclass
class Outcome:
    """What was measured for one case; scores are against the float model, engine against the trained model."""

    case: Case
    rtn: Scores
    qat: Scores
    engine: Scores
    receipt: Any
    checked: list[Any]
    bits_per_weight: float
    coverage: float
    file_bytes: int
    float_bytes: int
    curve: Curve
    errors: dict[str, dict[str, float]]
    completions: list[str]
    seconds: float


@dataclass
class Demo:
    """The state that the stages share; `run` goes through them in order."""

    settings: Settings
    out: Path
    seed: int
    progress: Any
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """All stages; returns what results.json holds. Writes below `out`."""
        began = time.monotonic()
        options = self.settings
        self.out.mkdir(parents=True, exist_ok=True)
        self.corpus, self.tokenizer, self.train, held_out = self.data()
        self.held_out = evenly(held_out, options.held_out_blocks)
        self.watched = evenly(held_out, options.watched_blocks)
        self.float_model, self.float_curve = self.pretrain()
        with self.stage("held-out text"):
            self.reference = list(log_probs(self.float_model, self.held_out))
            self.watched_reference = list(log_probs(self.float_model, self.watched))
            self.float_scores = compare(self.reference, self.reference, self.held_out)
            self.float_texts = [self.text(greedy(self.float_model, *self.prompt(p))) for p in PROMPTS]
        self.continued, self.continued_curve = self.train_on()
        self.outcomes = [self.case(case) for case in self.cases()]
        self.q8, self.q8_bytes = self.reference_file()
        self.seconds["all"] = time.monotonic() - began
        return save_results(self)

    # ---- data and float model --------------------------------------------------------------------------------------

    def data(self) -> tuple[Corpus, Any, Tensor, Tensor]:
        """Corpus, tokenizer, training and held-out blocks [N, context]."""
        options = self.settings
        with self.stage("source text"):
            corpus = read_corpus(limit=options.corpus_limit)
        with self.stage("tokenizer"):
            tokenizer = train_tokenizer(corpus.train[::4], options.vocab)
            train = token_blocks(tokenizer, corpus.train, options.context)
            held_out = token_blocks(tokenizer, corpus.held_out, options.context)
        return corpus, tokenizer, train, held_out

    def pretrain(self) -> tuple[Any, Curve]:
        """A Llama from random weights, with a plain Trainer."""
        from transformers import LlamaConfig, LlamaForCausalLM

        options = self.settings
        L.seed_everything(self.seed, verbose=False)
        end = self.tokenizer.convert_tokens_to_ids(END)
        config = LlamaConfig(
            hidden_size=options.hidden,
            intermediate_size=options.inner,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.heads // 2,
            vocab_size=len(self.tokenizer),
            max_position_embeddings=options.context,
            tie_word_embeddings=False,
            bos_token_id=end,
            eos_token_id=end,
        )
        model = LlamaForCausalLM(config)
        curve = Curve()
        self.fit(model, "float model", options.float_steps, options.float_lr, [curve], order=0, decay=0.05)
        model.eval().save_pretrained(self.out / "float")
        self.tokenizer.save_pretrained(self.out / "float")
        return model, curve

    def train_on(self) -> tuple[Scores, Curve]:
        """The control: the float model for as many further steps, in the same order of data, as the quantized ones."""
        model = copy.deepcopy(self.float_model)
        curve = Curve(self.watch)
        self.fit(model, "float trained on", self.settings.extra_steps, self.settings.lr_4bit, [curve])
        return self.score(model), curve

    def fit(
        self,
        model: nn.Module,
        title: str,
        steps: int,
        lr: float,
        callbacks: list[Any],
        order: int = 1,
        decay: float = 0.0,
    ) -> CausalLM:
        """One Lightning fit on `steps` batches; `order` 0 is pretraining's order of blocks, 1 that of all others."""
        options = self.settings
        began = time.monotonic()
        count = steps * options.batch
        generator = torch.Generator().manual_seed(1000 * self.seed + order)
        rounds = [torch.randperm(len(self.train), generator=generator) for _ in range(-(-count // len(self.train)))]
        blocks = self.train[torch.cat(rounds)[:count]]
        loader = torch.utils.data.DataLoader(Blocks(blocks), batch_size=options.batch)
        module = CausalLM(model.train(), Train(lr=lr, max_steps=steps, weight_decay=decay, batch_size=options.batch))
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            gradient_clip_val=1.0,
            callbacks=[*callbacks, StageBar(self.progress, title)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        L.seed_everything(self.seed, verbose=False)
        trainer.fit(module, loader)
        model.eval()
        self.seconds[title] = time.monotonic() - began
        return module

    # ---- quantized -------------------------------------------------------------------------------------------------

    def cases(self) -> list[Case]:
        """The presets as they are, but for the learning rate and the number of steps of a model this small."""
        options = self.settings

        def preset(name: str, lr: float) -> Recipe:
            return load_recipe(name, [f"train.lr={lr}", f"train.max_steps={options.extra_steps}"])

        return [
            Case("4 bits (Q4_0)", "4bit", "gguf", "llama.cpp", preset("w4_gguf_q4_0", options.lr_4bit)),
            Case("2 bits (g64)", "2bit", "compressed-tensors", "transformers", preset("w2_g64", options.lr_2bit)),
        ]

    def case(self, case: Case) -> Outcome:
        """Round to nearest, then train, export, read back."""
        began = time.monotonic()
        names = [name for name, module in self.float_model.named_modules() if isinstance(module, nn.Linear)]
        with self.stage(f"{case.name}: RTN"):
            rounded = copy.deepcopy(self.float_model)
            qat.prepare(rounded, case.recipe)
            rtn = self.score(rounded)
            errors = {"RTN": output_errors(self.float_model, rounded, names, self.watched)}
        folder = self.out / case.folder
        curve = Curve(self.watch)
        callbacks = [
            QATCallback(case.recipe),
            DistillationCallback(),
            curve,
            ExportCallback(str(folder), format=case.format, tokenizer=self.tokenizer, overwrite=True),
        ]
        model = copy.deepcopy(self.float_model)
        options = case.recipe.train
        trained_module = self.fit(model, f"{case.name}: QAT", options.max_steps, options.lr, callbacks)
        plan = qat.convert(trained_module).plan
        with self.stage(f"{case.name}: file in {case.reader}"):
            trained = list(log_probs(model, self.held_out))
            scores = compare(self.reference, trained, self.held_out)
            errors["QAT"] = output_errors(self.float_model, model, names, self.watched)
            receipt = qat.Receipt.load(folder)
            checked = [row for row in qat.verify(folder) if row.spec != "float"]
            served, texts = self.llama_cpp(folder) if case.format == "gguf" else self.transformers(folder)
            engine = compare(trained, served, self.held_out)
        bits = sum(r.params * r.weight.bits_per_weight(r.columns) for r in plan.rows if r.weight is not None)
        bits /= sum(r.params for r in plan.rows)
        return Outcome(
            case, rtn, scores, engine, receipt, checked, bits, plan.coverage,
            max(file.bytes for file in receipt.files),
            plan.float_bytes, curve, errors, texts, time.monotonic() - began,
        )  # fmt: skip

    def llama_cpp(self, folder: Path) -> tuple[list[Tensor], list[str]]:
        """(log-probabilities of the held-out blocks, completions) by llama.cpp on the exported file."""
        file = next(folder.glob("*.gguf"))
        with LlamaCpp(file, context=self.settings.context, threads=torch.get_num_threads()) as served:
            found = list(served.log_probs(self.held_out))
            texts = []
            for prompt in PROMPTS:
                ids, count, *_ = self.prompt(prompt)
                texts.append(self.text(served.generate(ids, count)))
        return found, texts

    def transformers(self, folder: Path) -> tuple[list[Tensor], list[str]]:
        """The same by transformers, which unpacks with compressed-tensors."""
        from transformers import AutoModelForCausalLM

        # compressed-tensors draws bars of its own while it unpacks, at loading and in the first forward.
        with contextlib.redirect_stderr(io.StringIO()):
            served = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            found = list(log_probs(served, self.held_out))
        return found, [self.text(greedy(served, *self.prompt(prompt))) for prompt in PROMPTS]

    def reference_file(self) -> tuple[Scores, int]:
        """What llama.cpp's 8-bit activations add: the float model as Q8_0, PyTorch against llama.cpp."""
        q8_0 = {"bits": 8, "granularity": "group", "group_size": 32, "narrow": True, "quantizer": "absmax"}
        rule = {"types": ["Linear", "Embedding"], "weight": q8_0}
        recipe = from_dict({"name": "float_q8_0", "rules": {"all": rule}, "export": {"targets": ["gguf"]}})
        with self.stage("float as Q8_0 in llama.cpp"):
            model = copy.deepcopy(self.float_model)
            qat.prepare(model, recipe)
            folder = self.out / "float_q8_0"
            receipt = qat.export(model, folder, format="gguf", tokenizer=self.tokenizer, overwrite=True)
            served, _ = self.llama_cpp(folder)
            return compare(log_probs(model, self.held_out), served, self.held_out), receipt.bytes

    # ---- small things ----------------------------------------------------------------------------------------------

    def score(self, model: nn.Module) -> Scores:
        return compare(self.reference, log_probs(model, self.held_out), self.held_out)

    def watch(self, model: nn.Module) -> float:
        return compare(self.watched_reference, log_probs(model, self.watched), self.watched).kl

    def prompt(self, text: str) -> tuple[list[int], int, int, int]:
        """Arguments of `greedy` after the model: ids, tokens, context, end."""
        end = self.tokenizer.convert_tokens_to_ids(END)
        ids = [end, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        return ids, self.settings.completion_tokens, self.settings.context, end

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))

    def stage(self, title: str) -> Any:
        return self.progress.stage(title, self.seconds)


class Blocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Blocks [N, T] as samples of `CausalLM`."""

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def run_demo(settings: Settings, out: Path, seed: int = 0, console: Console | None = None) -> dict[str, Any]:
    """One run; returns what results.json holds. `out` keeps nothing of an earlier run."""
    for name in ("float", "4bit", "2bit", "float_q8_0"):
        shutil.rmtree(out / name, ignore_errors=True)
    with stages(console) as progress:
        return Demo(settings, out, seed, progress).run()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m qat.tasks.demo", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order of data (default: %(default)s)")
    parser.add_argument("--fast", action="store_true", help="a few steps of a tiny model: does it run?")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    # Threads wait for each other at every small operation: with one of two cores busy, a step on two threads took
    # 0.9 s where one thread took 0.14 s.
    torch.set_num_threads(chosen.threads)
    console = Console()
    hush()
    try:
        results = run_demo(FAST if chosen.fast else FULL, chosen.out, chosen.seed, console)
    except qat.QATError as problem:
        Console(stderr=True).print(f"[bold red]error:[/] {problem}", highlight=False)
        return 2
    print_table(results, console)
    console.print(f"report   {chosen.out / 'report.html'}\nfigures  {chosen.out / 'results.json'}", highlight=False)
    return 0


def hush() -> None:
    """The demo's screen is its progress bars and its table: no notices of the trainer about loggers and workers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(lightning|pytorch_lightning|torch)\b")
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
