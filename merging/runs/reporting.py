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
from merging.runs.computing import Observer, available_processors, compute, computed
from merging.runs.outputs import hidden_report
from merging.runs.pictures import INSTALL, can_draw
from merging.runs.report import Measurements, Report
from merging.runs.report_page import card_picture, content_of
from merging.runs.thresholds import with_thresholds

CARD_PICTURE = "merge.svg"


class Reporting:
    """The reports of a plan; none if no files are named."""

    def __init__(self, recipe: Recipe, plan: Plan, files: Sequence[str]) -> None:
        self._recipe, self._plan = recipe, plan
        self._hidden = {Path(file): hidden_report(Path(file)) for file in files}
        self._measurements = Measurements()
        self.observe: Observer | None = self._measurements if files else None
        self.picture = CARD_PICTURE if files and can_draw() else None  # of a model card

    @contextmanager
    def staged(self, tell: Callable[[str], None], warn: Callable[[str], None]) -> Iterator[None]:
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
                    warn(f"warning: no report: {explain(error)}")
                else:
                    tell(f"report: {file}")
        finally:
            for hidden in self._hidden.values():
                with suppress(OSError):
                    hidden.unlink(missing_ok=True)

    def measure(self, device: torch.device, threads: int | None, show_progress: bool) -> None:
        """Compute the model only to report of it."""
        if not self._hidden:
            return
        threads = threads or available_processors()
        plan = with_thresholds(self._plan, device, threads, show_progress)
        task = partial(compute, device=device, observe=self.observe)
        with (
            computed(plan, plan.tensors, task, device, threads) as tensors,
            tqdm(total=plan.nbytes, unit="B", unit_scale=True, disable=not show_progress) as bar,
        ):
            for tensor in tensors:
                bar.update(tensor.nbytes)
        plan.check_sources()
        self.write()

    def write(self, folder: Path | None = None) -> None:
        """Write the reports beside their places, and the picture of a card into its folder."""
        if not self._hidden:
            return
        report = Report(self._recipe, self._plan, self._measurements.found)
        for file, hidden in self._hidden.items():
            hidden.unlink(missing_ok=True)  # what a killed run left; a link must not be followed
            with hidden.open("xb") as stream:
                stream.write(content_of(report, file))
        if folder is not None and self.picture:
            (folder / self.picture).write_text(card_picture(report), encoding="utf-8")
