"""What stands in for journal and store in the processes of a run that write nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan
from qinit.report.report import LayerRow
from qinit.workplace.decoded import Decoder
from qinit.workplace.journal import Journal, Record
from qinit.workplace.store import Store


class NoJournal(Journal):
    """A journal in which nothing stands: that of the first process is the run's."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def append(self, *records: Record, sync: bool = True) -> None:
        """Keep nothing."""


class Follower(Store):
    """Knows which layers are finished, `rows`, and what they come to."""

    def __init__(self, plan: Plan, rows: Mapping[str, LayerRow]) -> None:
        self.plan, self.decoder = plan, Decoder(plan)
        self.rows = dict(rows)

    def put(self, layer: LayerPlan, tensors: dict[str, torch.Tensor], row: LayerRow) -> LayerRow:
        """Take note that a layer is finished; the first process writes it."""
        self.rows[row.name] = row
        return row
