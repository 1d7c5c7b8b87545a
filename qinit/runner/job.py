"""A run under way: where it writes to, and what is known so far."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch

from qinit.calibration.loss_gradient import loss_gradients
from qinit.calibration.output_metric import output_metrics
from qinit.clock import section
from qinit.events import Event, Noted, Sampling
from qinit.linalg.low_rank import OutputMetric
from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan
from qinit.planner.memory import tokens_of_polish
from qinit.processes.group import ALONE, Processes
from qinit.recipe import SELF
from qinit.runner.room import in_portions
from qinit.solver.spec import Gradient
from qinit.text.for_run import polish_text, text_for
from qinit.text.samples import Portion, Samples
from qinit.workplace.follower import Follower
from qinit.workplace.journal import Journal
from qinit.workplace.kept import POLISH_SAMPLES, load_samples, save_samples
from qinit.workplace.place import Workplace
from qinit.workplace.store import Store


@dataclass
class Job:
    """What the stages of a run share. `calibration` is what the report says of it, and `spilled` names layers that the
    device had no room for. Of several `processes` each has a job; that of the first alone writes."""

    plan: Plan
    device: torch.device
    place: Workplace
    journal: Journal
    token: str | None
    processes: Processes = ALONE
    calibration: dict[str, Any] = field(default_factory=dict)
    spilled: list[str] = field(default_factory=list)
    _samples: Samples | None = None
    _metrics: dict[str, OutputMetric] | None = None
    _gradients: dict[str, Gradient] | None = None

    @cached_property
    def store(self) -> Store:
        """Only once the widths are known: they decide the layout."""
        own = Store(self.plan, self.place, self.journal) if self.processes.first else None
        rows = self.processes.from_first(lambda: {} if own is None else own.rows, "what is finished")
        return Follower(self.plan, rows) if own is None else own

    @property
    def notes(self) -> list[str]:
        return [record["text"] for record in self.journal.records if record["kind"] == "note"]

    def note(self, text: str) -> Noted:
        if text not in self.notes:
            self.journal.append({"kind": "note", "text": text}, sync=False)
        return Noted(text)

    def samples(self) -> Generator[Event, None, Samples]:
        """Return the text that the model is run on: what was kept of it, or read or written anew and then kept."""
        if self._samples is None:
            self._samples = self.processes.from_first(lambda: load_samples(self.place, self.journal), "a kept text")
        if self._samples is None:
            recipe = self.plan.recipe
            yield Sampling(recipe.calibration if recipe.calibrated else SELF)
            with section("text"):
                self._samples = yield from self._text(partial(text_for, self.plan))
            if self.processes.first:
                save_samples(self.place, self.journal, self._samples, written=recipe.calibration == SELF)
        return self._samples

    def polish_samples(self) -> Generator[Event, None, tuple[Samples, Samples]]:
        """Return the text of the polish, and what calibration has seen of it."""
        seen = yield from self.samples()
        kept = partial(load_samples, self.place, self.journal, POLISH_SAMPLES)
        found = self.processes.from_first(kept, "a kept text")
        if found is None:
            tokens = tokens_of_polish(self.plan, seen.count)
            with section("text"):
                found = yield from self._text(partial(polish_text, self.plan, seen, tokens))
            if self.processes.first:
                save_samples(self.place, self.journal, found, written=False, kind=POLISH_SAMPLES)
        return found, seen

    def _text(self, read: Callable[..., Samples]) -> Generator[Event, None, Samples]:
        """Read a text or let the model write it, which may need more of the device than all that follows."""

        def write(portion: Portion) -> Generator[Event, None, Samples]:
            yield from ()
            return read(self.device, self.token, self.processes, portion)

        return (yield from in_portions(self, "the text", write, stays=False))

    def output_metrics(self) -> Generator[Event, None, dict[str, OutputMetric]]:
        """Measure, once, what errors at the layers' outputs cost, if the method asks for it."""
        if self._metrics is None:
            self._metrics = {}
            if "output metric" in self.plan.recipe.row.needs:
                samples = yield from self.samples()

                def measure(portion: Portion) -> Generator[Event, None, dict[str, OutputMetric]]:
                    place, processes = self.place.scratch, self.processes
                    return (yield from output_metrics(self.plan, samples, self.device, place, processes, portion))

                with section("pass back"):
                    self._metrics = yield from in_portions(self, "the pass back", measure)
        return self._metrics

    def gradients(self) -> Generator[Event, None, dict[str, Gradient]]:
        """Measure, once, the loss's gradient with respect to the layers' weights, if the method asks for it."""
        if self._gradients is None:
            self._gradients = {}
            if "gradient" in self.plan.recipe.row.needs:
                samples = yield from self.samples()

                def measure(portion: Portion) -> Generator[Event, None, dict[str, Gradient]]:
                    return (yield from loss_gradients(self.plan, samples, self.device, self.place.scratch, portion))

                with section("pass back"):
                    self._gradients = yield from in_portions(self, "the pass back", measure, alone=True)
        return self._gradients

    def weight(self, layer: LayerPlan, tensors: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Return Q + L [out, in] of a finished layer, on the device, as its trainer will have it: in the first process
        from its files, in the others from its `tensors`, which come from the first where they are not at hand."""
        if tensors is None and self.processes.several:
            tensors = self.processes.from_first(lambda: self.store.tensors(layer), "a finished layer")
        if tensors is None or self.processes.first:
            return self.store.weight(layer, self.device)
        return self.store.decoder.weight(layer, tensors, self.device)
