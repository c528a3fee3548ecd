"""`run(recipe)`: what `qat train` does. Model and data by `train.task`, callbacks by the recipe, one Lightning fit."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

import qat
from qat.callbacks import DistillationCallback, ExportCallback, QATCallback, QuantizationMonitor
from qat.callbacks.export_callback import refuse_short
from qat.errors import QATError
from qat.hf import check_weights, read_config
from qat.recipes import to_dict
from qat.recipes.schema import Recipe, Train
from qat.report import write_report, write_text
from qat.state import find_record, structure
from qat.tasks import TASKS, causal_lm, image_classification, sentence_embedding
from qat.tasks.flavour import lightning
from qat.tasks.measure import environment
from qat.tasks.progress import Curve, steps_bar

log = logging.getLogger(__name__)


def build(recipe: Recipe) -> tuple[Any, Any, Any]:
    """(LightningModule, data, tokenizer or None) of the recipe's task; raises QATError for an unknown one."""
    task, train = recipe.train.task, recipe.train
    check_teacher(recipe)
    if task == "causal_lm":
        return causal_lm.build(train)
    if task == "image_classification":
        return image_classification.build(train)
    if task == "sentence_embedding":
        return sentence_embedding.build(train, recipe.distill.teacher)
    raise QATError(f"train.task={task!r} is unknown; use one of {', '.join(TASKS)}")


def check_teacher(recipe: Recipe) -> None:
    """Raises QATError unless `distill.teacher`, where it is used, is a model folder with whole safetensors."""
    folder = recipe.distill.teacher
    if folder is None or not (recipe.distill.enabled or recipe.train.task == "sentence_embedding"):
        return
    try:
        read_config(folder)
        check_weights(folder)
    except QATError as problem:
        raise QATError(f"distill.teacher: {problem}") from None


def run(recipe: Recipe, *, dry_run: bool = False) -> dict[str, Any]:
    """Train, export to the recipe's targets and write results.json and report.html into `train.out`.

    dry_run plans and rehearses every export on the untrained model and writes nothing. Returns {"plan", "metrics",
    "exports": {format: folder}, "out"}. Raises QATError before the first step for what cannot be used.
    """
    out = Path(recipe.train.out or f"runs/{recipe.name}")
    if recipe.export.targets:
        refuse_short(recipe, recipe.train.max_steps)
    if not dry_run:
        refuse_mixing(recipe.train, out)
    module, data, tokenizer = build(recipe)
    if dry_run:
        return rehearsal(recipe, module, tokenizer)
    if recipe.train.resume:
        check_resume(recipe)
    lightning().seed_everything(recipe.train.seed, workers=True, verbose=False)
    curve = Curve()
    # kept codes would fill the memory that the weights were to leave free
    watch = QATCallback(recipe, code_cache=False if recipe.train.offload else None)
    callbacks: list[Any] = [watch]
    if recipe.distill.enabled and recipe.train.task != "sentence_embedding":
        wanted = recipe.distill
        words = wanted.loss, wanted.weight, wanted.temperature, wanted.teacher
        callbacks.append(DistillationCallback(*words, hidden=wanted.hidden))
    if recipe.train.logger != "none":
        callbacks.append(QuantizationMonitor())
    callbacks.append(curve)
    exporter = None
    if recipe.export.targets:
        exporter = ExportCallback(out / "export", recipe.export.targets, tokenizer=tokenizer, overwrite=True)
        callbacks.append(exporter)
    trainer = make_trainer(recipe.train, out, callbacks)
    trainer.fit(module, datamodule=data, ckpt_path=recipe.train.resume)
    if recipe.trains_nothing:
        # nothing was trained, so nothing was validated either
        trainer.validate(module, datamodule=data, verbose=False)
    if not recipe.train.offload:
        # validation need not fall on the last step: what is exported is what last.ckpt holds
        trainer.save_checkpoint(out / "checkpoints" / "last.ckpt")
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    results: dict[str, Any] = {
        "plan": watch.plan.render() if watch.plan is not None else "",
        "metrics": metrics,
        "exports": folders(out / "export", exporter),
        "out": str(out),
    }
    if trainer.is_global_zero:
        save(recipe, results, curve, exporter, watch, out)
    return results


def refuse_mixing(train: Train, out: Path) -> None:
    """Raises QATError if `out` holds the checkpoints of another run than the one that is resumed."""
    kept = out / "checkpoints"
    if not kept.is_dir() or not any(kept.iterdir()):
        return
    if train.resume and kept.resolve() in Path(train.resume).resolve().parents:
        return
    raise QATError(
        f"train.out: {kept} holds the checkpoints of an earlier run, which would be taken for this run's; give another "
        "folder (train.out=...), or go on from one of them (train.resume=...)"
    )


def check_resume(recipe: Recipe) -> None:
    """Raises QATError unless `train.resume` is a checkpoint of a run with this recipe's rules and phases."""
    path = Path(recipe.train.resume or "")
    if not path.exists():
        raise QATError(f"train.resume: there is no checkpoint {path}")
    if path.is_dir():
        # shards of a distributed run; the strategy that wrote them reads them
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        entries = dict(loaded["state_dict"])
    except Exception as problem:
        why = str(problem).partition("\n")[0].partition(". ")[0] or type(problem).__name__
        raise QATError(f"train.resume: {path} is not a checkpoint of a run: {why}") from None
    if "optimizer_states" not in loaded:
        raise QATError(f"train.resume: {path} holds weights alone, no optimizer to go on with; give a run's checkpoint")
    _, record = find_record(entries)
    if structure(record.recipe) != structure(to_dict(recipe)):
        raise QATError(
            f"train.resume: {path} was trained with other rules or phases than this recipe; resume with its own recipe"
        )


def rehearsal(recipe: Recipe, module: Any, tokenizer: Any) -> dict[str, Any]:
    """Plan, and export into a temporary folder, of the model as it is."""
    if recipe.fold.method == "rotate":
        qat.fold.apply(module, recipe)
    plan = qat.prepare(module, recipe)
    for target in recipe.export.targets:
        qat.rehearse_export(qat.convert(module, require_final=False), target, tokenizer)
    return {"plan": plan.render(), "metrics": {}, "exports": {}, "out": ""}


def make_trainer(train: Train, out: Path, callbacks: list[Any]) -> Any:
    """The Trainer of a recipe's `train`, with a progress bar and the last checkpoint in `out/checkpoints`."""
    L = lightning()
    bars = import_from(L, "callbacks")
    # no last-v1.ckpt on resume: last.ckpt is always this run's last
    checkpoint = bars.ModelCheckpoint(
        out / "checkpoints", filename="{step}", save_last=True, enable_version_counter=False
    )
    devices: Any = train.devices
    if devices.lstrip("-").isdigit():
        devices = int(devices)
    elif "," in devices:
        devices = [int(part) for part in devices.split(",")]
    try:
        return L.Trainer(
            accelerator=train.accelerator,
            devices=devices,
            strategy=train.strategy,
            num_nodes=train.num_nodes,
            precision=train.precision,
            max_steps=train.max_steps,
            accumulate_grad_batches=train.accumulate,
            gradient_clip_val=train.gradient_clip or None,
            val_check_interval=train.val_every * train.accumulate,
            check_val_every_n_epoch=None,
            logger=make_logger(train, out),
            # a checkpoint is put together in memory
            enable_checkpointing=not train.offload,
            callbacks=[*callbacks, *([] if train.offload else [checkpoint]), steps_bar()],
            default_root_dir=out,
            log_every_n_steps=min(10, train.max_steps),
            enable_model_summary=False,
        )
    except (ValueError, TypeError, RuntimeError, ImportError) as problem:
        # Lightning's own words about accelerators, devices and strategies that are not there.
        name = type(problem).__name__
        raise QATError(f"train: the trainer cannot be made with these settings ({name}: {problem})") from None


def import_from(package: Any, name: str) -> Any:
    """A sub-module of the copy of Lightning that is in use."""
    from importlib import import_module

    return import_module(f"{package.__name__}.{name}")


def make_logger(train: Train, out: Path) -> Any:
    """The logger of `train.logger`; raises QATError for an unknown one or one that is not installed."""
    loggers = import_from(lightning(), "loggers")
    if train.logger == "none":
        return False
    if train.logger == "csv":
        return loggers.CSVLogger(out, name="log")
    if train.logger == "wandb":
        try:
            return loggers.WandbLogger(save_dir=str(out), name=out.name)
        except ImportError:
            raise QATError('train.logger=wandb needs wandb; pip install "lightning-qat[wandb]"') from None
    raise QATError(f"train.logger={train.logger!r} is unknown; use none, csv or wandb")


def folders(base: Path, exporter: Any) -> dict[str, str]:
    """Format -> the folder that was written."""
    if exporter is None:
        return {}
    names = list(exporter.receipts)
    return {name: str(base if len(names) == 1 else base / name) for name in names}


def save(recipe: Recipe, results: dict[str, Any], curve: Curve, exporter: Any, watch: Any, out: Path) -> None:
    """results.json and the report."""
    rows = [
        {
            "suite": "train",
            "case": recipe.name,
            "tool": "qat",
            "metric": name,
            "value": value,
            "better": "higher" if name.endswith(("accuracy", "cosine")) else "lower",
        }
        for name, value in results["metrics"].items()
    ]
    receipts = {} if exporter is None else exporter.receipts
    for name, receipt in receipts.items():
        row = {"suite": "train", "case": recipe.name, "tool": name, "metric": "bytes", "value": receipt.bytes}
        rows.append({**row, "better": "lower"})
    out.mkdir(parents=True, exist_ok=True)
    measured = {"environment": {**environment(), "seed": recipe.train.seed}, "rows": rows}
    write_text(out / "results.json", json.dumps(measured, indent=1) + "\n")
    sections: list[dict[str, Any]] = [
        {"kind": "lines", "title": "Training loss", "x": "step", "y": "loss", "lines": [["QAT", curve.losses]]},
        {
            "kind": "table",
            "title": "Figures at the end",
            "columns": ["", "value"],
            "rows": [[name, f"{value:.5g}"] for name, value in results["metrics"].items()],
        },
    ]
    for name, receipt in receipts.items():
        lines = [[t.name, f"{t.max_abs_diff:g}", t.sha256[:12]] for t in receipt.tensors if t.spec is not None]
        sections.append(
            {
                "kind": "table",
                "title": f"{name}: {receipt.bytes:,} bytes, read back by {receipt.reader}",
                "columns": ["tensor", "largest difference to the trained weight", "sha256"],
                "rows": lines,
            }
        )
    if watch.plan is not None:
        plan = [
            [row.name, row.type, str(row.rule), str(row.weight or "float"), row.activations] for row in watch.plan.rows
        ]
        columns = ["layer", "type", "rule", "weight", "input"]
        sections.append({"kind": "table", "title": "Plan", "fold": "every layer", "columns": columns, "rows": plan})
    steps = 0 if recipe.trains_nothing else recipe.train.max_steps
    what = f"{recipe.train.task} from {recipe.train.model}, {steps} steps"
    lead = f"{recipe.description or recipe.name}: {what}."
    write_report({"title": f"Run {recipe.name}", "lead": lead, "sections": sections}, out)
