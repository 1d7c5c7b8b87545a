"""How the adapter of a family is loaded to be trained, and the card beside it that says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from qinit.adapters.base import WEIGHTS_STEM
from qinit.families.table import Family
from qinit.files.reading import printable
from qinit.report.calls import from_pretrained, own_code

CARD = """\
---
{front}---

# {method} on `{base}`

An adapter as PEFT {version} starts it ({config}, {paper}), made by qinit. The base itself is not in here.

{parameters:,} parameters are trained, in {modules}.

## Load
```python
{snippet}
```
{note}"""


def snippet_of(base: str, loader: str | None, place: str, *, prompts: bool, cache: bool, trusted: bool) -> list[str]:
    """Return the lines of Python that load a base, named or by its place, and the adapter, for training. `prompts`:
    PEFT loads what it puts before the text only to be used, so that it is made anew and given these values; `cache`
    says whether the base may keep one. Without a `loader` of transformers' the base is one that qinit.load loads."""
    name, adapter = (json.dumps(each, ensure_ascii=False) for each in (base, place))
    first = "import qinit" if loader is None else f"from transformers import {loader}"
    packed = f"qinit.load({name}, adapter=False{own_code(trusted)})"
    lines = [f"base = {packed if loader is None else from_pretrained(loader, name, trusted)}"]
    lines += [] if cache else ["base.config.use_cache = False"]
    if not prompts:
        lines.append(f"model = PeftModel.from_pretrained(base, {adapter}, is_trainable=True)")
        return [f"{first}; from peft import PeftModel", *lines]
    weights = json.dumps(f"{place}/{WEIGHTS_STEM}.safetensors", ensure_ascii=False)
    return [
        f"{first}; from safetensors.torch import load_file",
        "from peft import PeftConfig, get_peft_model, set_peft_model_state_dict",
        *lines,
        f"model = get_peft_model(base, PeftConfig.from_pretrained({adapter}))",
        f"set_peft_model_state_dict(model, load_file({weights}))",
    ]


def write_card(
    directory: Path, method: str, family: Family, base: str, *, parameters: int, modules: int, snippet: list[str]
) -> None:
    """Write README.md, with front matter as the Hub reads it."""
    import peft

    front: dict[str, Any] = {} if Path(base).is_absolute() else {"base_model": base}
    front |= {"library_name": "peft", "tags": ["qinit", method]}
    card = CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        method=method,
        base=printable(base),
        version=peft.__version__,
        config=family.config,
        paper=family.paper,
        parameters=parameters,
        modules=f"{modules} modules" if modules else "what the model reads before the text",
        snippet="\n".join(snippet),
        note=f"\n{family.note}.\n" if family.note else "",
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
