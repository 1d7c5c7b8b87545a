"""Adapter configurations to train from with no run before: what each trainer needs for that.

To add one: one file with a subclass of TemplateWriter, and one line in WRITERS.
"""

from __future__ import annotations

from qinit.trainers.templates.axolotl import AxolotlTemplate
from qinit.trainers.templates.base import Template, TemplateWriter
from qinit.trainers.templates.llama_factory import LlamaFactoryTemplate
from qinit.trainers.templates.peft import PeftTemplate
from qinit.trainers.templates.trl import TrlTemplate

WRITERS: dict[str, TemplateWriter] = {
    writer.name: writer for writer in (PeftTemplate(), TrlTemplate(), LlamaFactoryTemplate(), AxolotlTemplate())
}

__all__ = ["WRITERS", "Template", "TemplateWriter"]
