"""Callbacks that watch a fit: one progress bar per stage on a shared display, and the curves for the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import nn

from qat.tasks.flavour import lightning

_Callback: Any = lightning().Callback


class StageBar(_Callback):  # type: ignore[misc]
    """One line of a `rich.progress.Progress` for one fit."""

    def __init__(self, progress: Any, title: str) -> None:
        self.progress, self.title = progress, title
        self.line: Any = None

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.line = self.progress.add_task(self.title, total=trainer.max_steps, note="")

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        loss = float(outputs["loss"])
        self.progress.update(
            self.line, completed=trainer.global_step, note=f"{trainer.global_step}/{trainer.max_steps}, loss {loss:.4g}"
        )


class Curve(_Callback):  # type: ignore[misc]
    """Training loss of every step, and `measure(model)` every `every` steps and at the end."""

    def __init__(self, measure: Callable[[nn.Module], float] | None = None, every: int = 25) -> None:
        self.measure, self.every = measure, every
        self.losses: list[tuple[int, float]] = []
        self.measured: list[tuple[int, float]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._measure(trainer.global_step, module)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        step = trainer.global_step
        self.losses.append((step, float(outputs["loss"])))
        if step % self.every == 0 or step == trainer.max_steps:
            self._measure(step, module)

    def _measure(self, step: int, module: Any) -> None:
        if self.measure is not None:
            self.measured.append((step, self.measure(module.model)))


def steps_bar() -> Any:
    """Lightning's progress bar for a run that ends by steps; its own counts epochs to -2, which stands for none."""
    bars: Any = import_module(f"{lightning().__name__}.callbacks")

    class StepsBar(bars.RichProgressBar):  # type: ignore[misc]
        def _get_train_description(self, current_epoch: int) -> str:
            # as wide as "Validation" below it
            return f"{f'Epoch {current_epoch}':{len(self.validation_description)}}"

    return StepsBar()


class Stages:
    """The screen of a run with several stages: a line for each, with a bar where there are steps to count."""

    def __init__(self, progress: Any) -> None:
        self.add_task, self.update = progress.add_task, progress.update

    @contextmanager
    def stage(self, title: str, seconds: dict[str, float]) -> Iterator[None]:
        """A line without a count; its time goes to `seconds[title]`."""
        line = self.add_task(title, total=1, note="")
        began = time.monotonic()
        yield
        seconds[title] = time.monotonic() - began
        self.update(line, completed=1)


@contextmanager
def stages(console: Any = None) -> Iterator[Stages]:
    """A live display; nothing is shown without a console."""
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=console is None) as progress:
        yield Stages(progress)
