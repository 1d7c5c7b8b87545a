"""What a person sees of an evaluation."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING, Any

from qinit_cli.draw import Screen
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from qinit.evaluate.job import Evaluated, Event, Way

LINES = 10  # of progress where the output is no terminal


class EvalScreen(Screen):
    """Draws an evaluation."""

    _said = 0  # the share of the steps, in LINES, that was last said

    def way(self, way: Way) -> None:
        how = "block by block, one in memory at a time" if way.streamed else "with the whole model in memory"
        self.say(f"note: {how} ({way.reason})")

    def follow_evaluation(self, events: Generator[Event, None, None]) -> Evaluated:
        """Draw the progress and return the last event."""
        from qinit.evaluate.job import Block, Evaluated, Loading, Read, Tasking

        terminal = self._console.is_terminal and not self._quiet
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
        bar = Progress(*columns, TimeRemainingColumn(), console=self._console, disable=not terminal, transient=True)
        with closing(events), bar as progress:
            task = progress.add_task("starting", total=None)
            for event in events:
                match event:
                    case Loading(model):
                        progress.update(task, description=f"loading {model}")
                    case Block(model, done, total):
                        progress.update(task, description=f"{model}, block by block", completed=done, total=total)
                        self._step(f"{model}: block {done} of {total}", done, total, terminal)
                    case Read(done, total):
                        progress.update(task, description="predicting", completed=done, total=total)
                        self._step(f"window {done} of {total}", done, total, terminal)
                    case Tasking(names):
                        progress.update(task, description=f"lm-evaluation-harness: {', '.join(names)}", total=None)
                    case Evaluated():
                        return event
        raise AssertionError("an evaluation ends with its figures")

    def evaluated(self, name: str, row: dict[str, Any] | None, done: Evaluated, written: list[str]) -> None:
        """Draw the figures, how they were measured and where they were written."""
        from qinit.report.card import measured_words

        if self._quiet:
            return
        words: dict[str, str] = {}
        if row is not None:
            words["perplexity"] = f"{row['perplexity']:.3f} ({row['loss']:.4f} nats per token)"
            figures = done.figures
            if figures is not None and figures.reference_loss is not None:
                excess = figures.loss - figures.reference_loss
                words["original"] = f"{row['reference_perplexity']:.3f} of {row['reference']}: {excess:+.4f} nats"
                words["KL(original || it)"] = f"{figures.kl:.4f} nats per token"
                words["same top token"] = f"{100 * (figures.agreement or 0):.1f} %"
            words["text"] = row["text"]
            words["measured on"] = measured_words(row)
        for task, metrics in done.tasks.items():
            words[task] = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
        words["time"] = f"{done.seconds:.1f} s"
        self.facts(name, words)
        if written:
            self.say(f"written to {' and '.join(written)}")

    def _step(self, line: str, done: int, total: int, terminal: bool) -> None:
        """Say a step, about LINES of them, where there is no bar."""
        if not terminal and (done == total or done * LINES // total > self._said):
            self.say(line)
        self._said = 0 if done == total else done * LINES // total
