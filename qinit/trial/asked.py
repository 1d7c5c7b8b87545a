"""What the process that tries a run is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """What is to be tried: `how` is `names` (from headers, no package needed), `meta` (loaded without weights), `whole`
    or `blocks`; `class_name` loads the base, `source` is the model that the run was made from, where it is known."""

    run: str
    adapter: str
    class_name: str
    how: str
    source: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Answer:
    """Something that was found; `part` is `base` or `adapter`, what is not `grave` is only to be known. Of `kind` done:
    what was tried, in words."""

    part: str
    what: str
    grave: bool = True
    kind: str = "finding"
