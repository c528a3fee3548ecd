"""The command line: `qat recipes | plan | allocate | train | export | verify | report`.

Whatever is refused (a recipe, a model, a file, an argument) is one sentence on stderr and exit code 2; nothing has been
written then. 1 is a mistake of ours (`qat --debug ...` or QAT_DEBUG=1 shows where), 130 an interruption.
torch and everything above it is imported inside the commands: `qat --help` and `qat recipes` answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qat import __version__
from qat.errors import ExportError, QATError
from qat.refusals import explained

if TYPE_CHECKING:
    from qat.convert import Bundle
    from qat.recipes import Recipe

DEBUG = "QAT_DEBUG"

app = typer.Typer(
    name="qat",
    help="Train on the grid you deploy on: quantization-aware training that ends in packed files, bit for bit.",
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A preset (`qat recipes` lists them) or a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, like rules.linears.weight.bits=3."),
]
Model = Annotated[Path, typer.Option("--model", metavar="DIR", help="A Hugging Face model folder.")]


def _list_formats(wanted: bool) -> None:
    """The table of `qat export --list`."""
    if not wanted:
        return
    from rich.table import Table

    from qat.export import all_formats

    table = Table("format", "bits", "holds", "read by (--for)", "checked here with")
    for name, cls in sorted(all_formats().items()):
        table.add_row(name, cls.bits, cls.contents, ", ".join(cls.consumers), cls().reader())
    _show(table)
    raise typer.Exit


def _version(wanted: bool) -> None:
    if wanted:
        print(f"qat {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help=f"Show where an error comes from (or {DEBUG}=1).")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is done on the way.")] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"
    if verbose:
        import logging

        from rich.logging import RichHandler

        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this preset's YAML.")] = None,
) -> None:
    """The recipes that come with the package; with NAME, the text of one."""
    from rich.table import Table

    from qat.recipes import load_recipe, preset_names, preset_text

    if name is not None:
        print(preset_text(name), end="")
        return
    table = Table("recipe", "bits", "export", "what it is", title="presets", title_justify="left")
    for preset in preset_names():
        recipe = load_recipe(preset)
        table.add_row(preset, _bits(recipe), ", ".join(recipe.export.targets) or "-", recipe.description)
    _show(table)
    print("`qat recipes NAME` prints one; `qat train NAME key=value ...` changes single settings")


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="DIR", help="A Hugging Face model folder; else train.model.")
    ] = None,
) -> None:
    """What a recipe makes of a model: layer by layer, coverage, bytes, and whether the export formats hold it.

    The weights are not read, so this is quick for a model of any size.
    """
    from qat.recipes import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    folder = model or loaded.train.model
    if folder is None:
        raise QATError("there is no model to plan; give train.model=DIR or --model DIR")
    import qat
    from qat.hf import empty_model, has_tokenizer, load_tokenizer, trained_dtype

    empty = empty_model(folder, meta=True).to(trained_dtype(loaded.train.precision))
    if loaded.fold.method == "rotate":
        qat.fold.restructure(empty, loaded.fold.seed, loaded.fold.network)
    found = qat.prepare(empty, loaded, search=False)
    print(found.render().rstrip())
    words = load_tokenizer(folder) if has_tokenizer(folder) else None
    _targets(qat.convert(empty, require_final=False), words, loaded)


@app.command()
def allocate(
    recipe: RecipeArgument,
    bits: Annotated[
        float, typer.Option("--bits", metavar="BITS", help="Stored bits per weight, at most: 4.25, scales included.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the new recipe goes, a .yaml file.")],
    overrides: Overrides = None,
    choices: Annotated[
        str | None,
        typer.Option("--choices", metavar="BITS,...", help="Bits of a layer: 2,3,4,6; else all that the formats hold."),
    ] = None,
    rules: Annotated[
        str | None, typer.Option("--rules", metavar="NAME,...", help="Rules whose layers get other bits; else all.")
    ] = None,
    batches: Annotated[
        int, typer.Option("--batches", metavar="COUNT", help="Training batches on which losses are measured.")
    ] = 4,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
) -> None:
    """Choose bits for each layer so that the model has a number of bits per weight; writes a recipe that says which.

    The model runs once for each layer, number of bits and batch. For example: qat allocate w4_exl2 --bits 4.25 --out
    mixed.yaml train.model=DIR train.data='[texts.jsonl]', then qat train mixed.yaml
    """
    from rich.table import Table

    from qat.recipes import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    numbers = _numbers(choices) if choices is not None else []
    from qat.tasks.allocate import run
    from qat.tasks.flavour import quiet

    names = [name.strip() for name in rules.split(",")] if rules is not None else []
    with quiet():
        found = run(loaded, bits, out, choices=numbers, rules=names, batches=batches, overwrite=overwrite)
    table = Table("bits", "layers", title=found.recipe.name, title_justify="left")
    for own in sorted(set(found.bits.values())):
        layers = [layer for layer, each in found.bits.items() if each == own]
        table.add_row(str(own), f"{len(layers)}: {', '.join(layers)}")
    _show(table)
    print(", ".join(f"{name}: {value:.4f} bits per weight" for name, value in found.reached.items()))
    print(f"recipe: {out}")


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan and rehearse the export on the untrained model; write nothing.")
    ] = False,
) -> None:
    """Train a model with a recipe, export it and write a report.

    For example: qat train w4_gguf_q4_0 train.model=DIR train.data='[texts.jsonl]'
    """
    from rich.table import Table

    from qat.recipes import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from qat.tasks.flavour import quiet
    from qat.tasks.train import run

    with quiet():
        results = run(loaded, dry_run=dry_run)
    if dry_run:
        print(results["plan"].rstrip())
        print(f"export rehearsed and read back: {', '.join(loaded.export.targets) or 'the recipe has no target'}")
        return
    steps = 0 if loaded.trains_nothing else loaded.train.max_steps
    table = Table("figure", "value", title=f"{loaded.name}, {steps} steps", title_justify="left")
    for name, value in results["metrics"].items():
        table.add_row(name, f"{value:.5g}")
    _show(table)
    print(results["plan"].rstrip().rpartition("\n")[2])
    for name, folder in results["exports"].items():
        print(f"{name}: {folder}")
    print(f"report: {Path(results['out']) / 'report.html'}")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint of a run with qat.")],
    model: Model,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the packed model goes.")],
    format: Annotated[
        str | None, typer.Option("--format", metavar="FORMAT", help="gguf, compressed-tensors, ...; else the recipe's.")
    ] = None,
    consumers: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="PROGRAM,...", help="Instead of a format: llama.cpp, vllm, ... that will read it."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="DIR", help="Folder of the tokenizer; else the model's.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FOLDER if qat wrote it.")] = False,
    listed: Annotated[
        bool, typer.Option("--list", callback=_list_formats, is_eager=True, help="Show the formats and what they hold.")
    ] = False,
) -> None:
    """Pack the trained integers of a checkpoint, read the files back with their consumer's code, and compare.

    The recipe is in the checkpoint; --model gives the architecture, its weights are not read. Of several formats
    (--format a,b or --for x,y) each has a folder of its own in FOLDER; none is written unless all hold the model.
    """
    import qat
    from qat.errors import refuse_if
    from qat.export import formats_for, get_format
    from qat.export.atomic import RECEIPT, refuse_target
    from qat.hf import empty_model, has_tokenizer, load_tokenizer
    from qat.state import require_state
    from qat.tasks.image_classification import example_images

    wanted = formats_for(format, consumers)
    folders = {name: out / name if len(wanted) > 1 else out for name in wanted} or {"": out}
    for folder in folders.values():
        refuse_target(folder.absolute(), overwrite)
    if len(wanted) > 1 and (out / RECEIPT).is_file():
        raise ExportError(f"{out} is an export itself; name another folder for those of {', '.join(wanted)}")
    if tokenizer is None and has_tokenizer(model):
        tokenizer = model
    words = load_tokenizer(tokenizer) if tokenizer is not None else None
    trained = qat.load_from_checkpoint(checkpoint, empty_model(model))
    if not wanted:
        folders = {_only_target(require_state(trained).record.recipe): out}
    found = qat.convert(trained)
    if any(get_format(name).needs == "graph" for name in folders):
        found.example_inputs = example_images(model)
    for name in folders if len(folders) > 1 else ():
        refuse_if(get_format(name).check(found, words), f"{name} cannot hold this model", ExportError)
    for name, folder in folders.items():
        receipt = qat.export(found, folder, format=name, tokenizer=words, overwrite=overwrite)
        print(
            f"{folder}: {receipt.format}, {len(receipt.tensors)} tensors, {receipt.bytes:,} bytes; "
            f"each read back by {receipt.reader} equals the trained weight"
        )


@app.command()
def verify(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that qat exported.")]) -> None:
    """Check an exported folder against its receipt: files by hash, tensors by the consumer's own code."""
    from rich.table import Table

    import qat

    rows = qat.verify(folder)
    table = Table("tensor", "grid", "shape", "dtype", "max. difference", title=str(folder), title_justify="left")
    for row in rows:
        table.add_row(row.name, row.spec, "x".join(map(str, row.shape)) or "-", row.dtype, f"{row.max_abs_diff:g}")
    _show(table)
    print(f"{len(rows)} tensors read by {', '.join(sorted({row.reader for row in rows}))}: all as trained, bit for bit")


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of a run.")]) -> None:
    """Render the report of a run from the results that it wrote."""
    from qat.report import render

    print(render(folder))


def _bits(recipe: Recipe) -> str:
    """Weight / input bits of the rules, e.g. W4 or W8A8."""
    rules = list(recipe.rules.values())
    weights = sorted({rule.weight.bits for rule in rules if rule.weight})
    inputs = sorted({rule.input.bits for rule in rules if rule.input})
    shown = "W" + "/".join(map(str, weights)) if weights else ""
    return shown + ("A" + "/".join(map(str, inputs)) if inputs else "")


def _numbers(text: str) -> list[int]:
    """`2,3,4` as numbers of bits, in order."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and 2 <= int(part) <= 8 for part in parts):
        raise QATError(f"--choices {text!r} is not of the form 2,3,4,6, with whole numbers from 2 to 8")
    return sorted({int(part) for part in parts})


def _targets(found: Bundle, tokenizer: Any, recipe: Recipe) -> None:
    """Say for every format whether it holds the model; raises ExportError if one of the recipe's own does not."""
    from qat.export import all_formats, get_format

    refused = []
    for name in sorted({*all_formats(), *recipe.export.targets}):
        reasons = get_format(name).check(found, tokenizer)
        wanted = name in recipe.export.targets
        line = f"{name}{' (target)' if wanted else ''}: {'; '.join(reasons) or 'holds every grid exactly'}"
        bits = get_format(name).bits_per_weight(found) if wanted and not reasons else 0.0
        print(f"{line}, {bits:.4f} bits per weight" if bits else line)
        if reasons and wanted:
            refused.append(f"{name} cannot hold this recipe: {'; '.join(reasons)}")
    if refused:
        raise ExportError("; ".join(refused))


def _only_target(recipe: dict[str, Any]) -> str:
    targets = recipe.get("export", {}).get("targets", [])
    if len(targets) != 1:
        raise QATError(
            f"the recipe has {len(targets)} export targets ({', '.join(targets) or 'none'}); name one or several: "
            "--format a,b"
        )
    return str(targets[0])


def _show(table: Any) -> None:
    """A table on the screen; in a pipe or a file wide enough that nothing is cut."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160, soft_wrap=False).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    kept = os.environ.get(DEBUG)
    try:
        code = app(list(arguments) if arguments is not None else None, prog_name="qat", standalone_mode=False)
        sys.stdout.flush()
        return _say("interrupted", 130) if code == 130 else code if isinstance(code, int) else 0
    except Exception as problem:
        if isinstance(problem, BrokenPipeError):
            # whoever reads our output has seen enough; keep the interpreter from flushing into the closed pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if isinstance(problem, typer.Abort):
            return _say("interrupted", 130)
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            raise
        return _say(*explained(problem, DEBUG))
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except SystemExit as stop:
        # the trainer shuts down and exits with 1 when it is interrupted
        if isinstance(stop.__context__, KeyboardInterrupt):
            return _say("interrupted", 130)
        raise
    finally:
        if kept is None:
            os.environ.pop(DEBUG, None)


def _say(sentence: str, code: int) -> int:
    print(f"qat: {' '.join(sentence.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
