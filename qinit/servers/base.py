"""What is known of a server, as data: which bases it loads, and what of an adapter it takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

DENSE, GPTQ, COMPRESSED_TENSORS, AUTO_ROUND, BITSANDBYTES = (
    *("dense", "gptq", "compressed-tensors", "auto-round"),
    "bitsandbytes",
)
MLX, GGUF = "mlx", "gguf"
PEFT = "peft"  # the form of an adapter that PEFT saves; others have those of their bases


@dataclass(frozen=True)
class BaseRule:
    """What a server loads of bases that are stored in one form; None is any."""

    bits: Collection[int] | None = None
    group_sizes: Collection[int] | None = None
    zero_points: bool = True  # or only grids that are symmetric
    mixed: bool = True  # whether layers may have different widths or group sizes
    packages: tuple[str, ...] = ()  # that it needs beside its own
    no_adapter: str = ""  # why it puts no adapter on such a base, "" where it does


@dataclass(frozen=True)
class AdapterRule:
    """What a server takes of an adapter. `form` is how it must be stored."""

    form: str
    most_rank: int | None = None  # by default; `rank_option` raises it, to one of `rank_choices`
    rank_option: str = ""
    rank_choices: tuple[int, ...] = ()
    rslora: bool = True
    dora: bool = False
    whole: Collection[str] = ()  # what may stand in modules_to_save
    everything: bool = False  # takes all that PEFT has
    since: str = ""  # what older versions read of ranks and scales by module, where that is less


@dataclass(frozen=True)
class Server:
    """A server. `version` is the one whose source was read, or that was run; `bases` are the rules by form, `instead`
    says how to get a form that it loads, `fuses` whether it computes q, k and v, and gate and up, as one layer."""

    name: str
    version: str
    bases: Mapping[str, BaseRule]
    adapter: AdapterRule
    instead: str
    fuses: bool = False
