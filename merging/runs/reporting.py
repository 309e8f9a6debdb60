"""The reports that a run was asked for: measured while it computes, put in place at its end."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from merging.plans.plan import Plan
from merging.problems import explain
from merging.recipes.recipe import Recipe
from merging.runs.computing import available_processors, compute, computed
from merging.runs.pictures import INSTALL, can_draw
from merging.runs.report import Measurements, Report
from merging.runs.report_page import card_picture, content_of
from merging.runs.staging import siblings
from merging.runs.thresholds import with_thresholds

CARD_PICTURE = "merge.svg"


class Reporting:
    """The reports of a plan; none if no files are named."""

    def __init__(
        self, recipe: Recipe, plan: Plan, files: Sequence[str], warn: Callable[[str], None]
    ) -> None:
        self._recipe, self._plan, self._warn = recipe, plan, warn
        self._hidden = {Path(file): siblings(Path(file))[0] for file in files}
        self.observe: Measurements | None = Measurements() if files else None
        self.picture = CARD_PICTURE if files and can_draw() else None  # of a model card

    @contextmanager
    def staged(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Give what was written its names when the `with` ends well; else remove it.

        What goes wrong at that very end is a warning.
        """
        if self._hidden and not can_draw():
            tell(f"note: {INSTALL}")
        try:
            yield
            for file, hidden in self._hidden.items():
                try:
                    os.replace(hidden, file)
                except OSError as error:
                    self._warn(f"warning: no report: {explain(error)}")
                else:
                    tell(f"report: {file}")
        finally:
            for hidden in self._hidden.values():
                with suppress(OSError):
                    hidden.unlink(missing_ok=True)

    def measure(self, device: torch.device, threads: int | None, show_progress: bool) -> None:
        """Compute the model only to report of it."""
        if self.observe is None:
            return
        threads = threads or available_processors()
        plan = with_thresholds(self._plan, device, threads, show_progress)
        task = partial(compute, device=device, observe=self.observe)
        with (
            computed(plan.tensors, plan.tensors, task, device, threads) as tensors,
            tqdm(total=plan.nbytes, unit="B", unit_scale=True, disable=not show_progress) as bar,
        ):
            for tensor in tensors:
                bar.update(tensor.nbytes)
        plan.check_sources()
        report = Report(self._recipe, self._plan, self.observe.found)
        for file in self._hidden:
            self._write(report, file)

    def write(self, folder: Path | None) -> None:
        """Write the reports beside their places, and the picture of a card into its folder.

        The model stays if a report cannot be written: that is a warning.
        """
        if self.observe is None:
            return
        report = Report(self._recipe, self._plan, self.observe.found)
        for file, hidden in list(self._hidden.items()):
            try:
                self._write(report, file)
            except OSError as error:
                self._warn(f"warning: no report: {explain(error)}")
                with suppress(OSError):
                    hidden.unlink(missing_ok=True)
                del self._hidden[file]
        if folder is not None and self.picture:
            (folder / self.picture).write_text(card_picture(report), encoding="utf-8")

    def _write(self, report: Report, file: Path) -> None:
        hidden = self._hidden[file]
        hidden.unlink(missing_ok=True)  # what a killed run left; a link must not be followed
        with hidden.open("xb") as stream:
            stream.write(content_of(report, file))
