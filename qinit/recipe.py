"""A recipe: everything that decides what a run writes, checked once, and kept in its qinit.json."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qinit.errors import RecipeError, did_you_mean
from qinit.formats import FORMATS
from qinit.grids import GRIDS
from qinit.recipe_files import read_recipe
from qinit.solver.methods import CALIBRATED, METHODS, STARTS, Method, get_method, on_base, on_grid
from qinit.solver.start_options import start_defaults, start_problem
from qinit.source.targets import ALL_LINEAR
from qinit.words import parse_size, parse_time

MOST_TOKENS = 2**28
LARGEST = 2**24  # rank, samples, tokens of one, steps: more is a slip, and all of it would be asked of the memory

# Calibration on what the model writes, on what qinit brings, on tokens that are drawn.
NAMED_TEXTS = SELF, BUNDLED, RANDOM = "self", "text", "random"

BUDGETS = ("ratio", "target_bits", "target_size")  # a recipe that has one is of mixed widths

# What a quality sets, where nothing else is given; what `polish` becomes is the planner's to say.
QUALITIES: dict[str, dict[str, Any]] = {
    "fast": {"calibration_budget": "5m", "polish": 0},
    "balanced": {},
    "best": {"calibration_budget": "30m"},
}


class Recipe(BaseModel):
    """The options of one run. Fields have the names of the command line's options."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str | None = None  # None: the embedded demo model
    revision: str | None = None
    base: str | None = None  # a base that exists and is repaired, a directory or a Hub id: only a low rank is fitted
    method: str = "eqft"
    bits: int = 2  # the method's grid says which there are
    rank: int = Field(16, ge=1, le=LARGEST)
    iter: int | None = Field(None, ge=1, le=100)  # None: as many as the method's row says
    group_size: int = Field(64, ge=8)
    symmetric: bool = False  # zero points about the middle alone, which forms without zero points hold too
    format: str = "gptq"
    lora_alpha: float | None = Field(None, gt=0, le=1e9, allow_inf_nan=False)  # None: the rank
    lora_dropout: float = Field(0.0, ge=0, lt=1, allow_inf_nan=False)  # written into the adapter's file, for trainers
    use_rslora: bool = False
    use_dora: bool = False
    grid: str | None = None  # of a start's base below 16 bits; None: int
    niter: int | None = Field(None, ge=1, le=100)  # power iterations in the place of a start's full decomposition
    corda_method: str | None = None  # ipm or kpm, which triplets CorDA takes; None: ipm
    target_modules: str = ALL_LINEAR
    exclude: str | None = None
    calibration: str = "auto"  # decided by the plan; "none", or what `load_samples` takes
    calibration_budget: str = "10m"  # what `auto` may take at nominal speed
    text_field: str | None = None
    calibration_samples: int = Field(128, ge=1, le=LARGEST)
    calibration_length: int = Field(512, ge=2, le=LARGEST)
    calibration_mode: Literal["sequential", "parallel"] = "sequential"
    rounding: Literal["gptq", "nearest"] | None = None  # None: the method's own
    act_order: bool = False
    polish: int | None = Field(None, ge=0, le=LARGEST)  # steps; None: as many as the quality and their cost allow
    quality: Literal["fast", "balanced", "best"] = "balanced"
    check: bool = True  # look at the run at its end, and measure it; changes no weight
    max_shard_size: str = "5GB"
    device: str = "auto"
    seed: int = Field(0, ge=0, lt=2**63)  # what torch takes
    ratio: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)  # share of weights at bits_high: mixed widths
    bits_low: int | None = None
    bits_high: int | None = None
    target_bits: float | None = Field(None, gt=0, allow_inf_nan=False)  # or a budget per weight, over bits_choices
    count_adapter: bool = False  # in target_bits: groups and ranks are chosen with the widths then
    target_size: str | None = None  # or one of base and adapter together, as 60MB, for all three
    bits_choices: tuple[int, ...] | None = None
    allocation: Literal["sensitivity", "uniform", "first", "last", "random"] = "sensitivity"
    tie: Literal["none", "fused"] = "none"
    sensitivity: str | None = None  # a file that an earlier run has measured
    rank_budget: str | None = None  # total size of the adapter, as 20MB
    trust_remote_code: bool = False  # run code that the checkpoint brings; never from a file

    @model_validator(mode="before")
    @classmethod
    def _quality_and_method_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {**QUALITIES.get(str(values.get("quality")), {}), **start_defaults(values), **values}

    @field_validator("polish", mode="before")
    @classmethod
    def _polish_auto(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if re.fullmatch(r"-?\d{1,18}", value, re.ASCII):
            return int(value)
        if value != "auto":
            raise ValueError("expected a number of steps, or auto")
        return None

    @model_validator(mode="before")
    @classmethod
    def _mixed_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not any(values.get(key) is not None for key in BUDGETS):
            return values
        if values.get("format", "dense") == "dense":  # no stock loader takes packed mixed widths
            return {"format": "dense", **values}
        return {"tie": "fused", **values}  # servers do, and fuse layers

    @model_validator(mode="before")
    @classmethod
    def _base_defaults(cls, values: Any) -> Any:
        given = isinstance(values, dict) and values.get("base") is not None
        return {"format": "dense", "bits": 16, **values} if given else values  # what there is says the base itself

    @field_validator("bits_choices", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if isinstance(value, str):
            if not all(part.strip().isdecimal() for part in value.split(",")):
                raise ValueError("expected widths like 2,3,4")
            value = [int(part) for part in value.split(",")]
        if isinstance(value, list | tuple) and not all(type(width) is int for width in value):
            raise ValueError("expected widths like 2,3,4")
        return tuple(sorted(set(value))) if isinstance(value, list | tuple) else value

    @field_validator("ratio", "target_bits", "lora_alpha", "lora_dropout", mode="before")
    @classmethod
    def _whole_numbers_are_fine(cls, value: Any) -> Any:
        return float(value) if type(value) is int else value

    @field_validator("calibration_budget", mode="before")
    @classmethod
    def _minutes(cls, value: Any) -> Any:
        return f"{value:g}m" if type(value) in (int, float) else value

    @field_validator("calibration_budget")
    @classmethod
    def _parsable_time(cls, value: str) -> str:
        parse_time(value)
        return value

    @field_validator("lora_alpha")
    @classmethod
    def _divisible(cls, value: float | None) -> float | None:
        if value is not None and value < 1e-9:  # A and B are divided by its square root, in float32
            raise ValueError("expected at least 1e-9")
        return value

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        name, _, index = value.partition(":")
        if value not in ("auto", "cpu", "cuda") and not (name == "cuda" and index.isascii() and index.isdecimal()):
            raise ValueError("expected auto, cpu, cuda or cuda:N")
        return value

    @field_validator("max_shard_size", "rank_budget", "target_size")
    @classmethod
    def _parsable_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        method = get_method(self.method)
        if self.base is not None:
            method = self._check_base(method)
        if self.format not in FORMATS:
            raise ValueError(
                f"format: no '{self.format}'{did_you_mean(self.format, FORMATS)}; known are {', '.join(FORMATS)}"
            )
        own = {key: getattr(self, key) for key in ("bits", "grid", "niter", "corda_method", "polish", "use_dora")}
        if (problem := start_problem(self.method, **own)) is not None:
            raise ValueError(problem)
        self._check_widths(method)
        self._check_mixed(method)
        self._check_calibration(method)
        problem = FORMATS[self.format].cannot_hold(self.row.grid, self.widths[0], self.group_size)
        if problem:
            raise ValueError(f"format: {self.format} {problem}")
        if (problem := FORMATS[self.format].cannot_adapt(self.adapter)) is not None:
            raise ValueError(f"format: {problem}; give dense")
        return self

    def _check_base(self, method: Method) -> Method:
        """Return what the method does where Q is there; raise ValueError for what a base that exists leaves no room
        for."""
        row = on_base(method)
        if row is None:
            those = ", ".join(name for name, each in METHODS.items() if on_base(each) is not None)
            raise ValueError(f"method: {method.name} chooses Q itself; on a base that exists take one of {those}")
        if self.mixed:
            raise ValueError("base: has its widths, so there is no budget to give")
        for option, what in (
            ("bits", 16),
            ("format", "dense"),
            ("iter", None),
            ("group_size", 64),
            ("symmetric", False),
        ):
            if getattr(self, option) != what:
                raise ValueError(f"{option}: the base that exists has its own; leave it out")
        return row

    def _check_widths(self, method: Method) -> None:
        grid = (self.grid or "int") if method.name in STARTS and self.bits != 16 else method.grid
        if self.symmetric and grid != "int":
            raise ValueError(f"symmetric: is about integer grids, and method {self.method} has grid {grid}")
        full = (16,) if method.name in STARTS and self.base is None else ()
        offered = tuple(sorted({*GRIDS[grid].bits, *full}))
        for option in ("bits", "bits_low", "bits_high", "bits_choices"):
            given = getattr(self, option)
            for width in given if isinstance(given, tuple) else (given,):
                if width is not None and width not in offered:
                    words = " or ".join(filter(None, (", ".join(map(str, offered[:-1])), str(offered[-1]))))
                    raise ValueError(f"{option}: method {self.method} offers {words}, found {width}")

    def _check_mixed(self, method: Method) -> None:
        if not self.mixed:
            for option in (
                *("bits_low", "bits_high", "bits_choices", "count_adapter", "allocation", "tie", "sensitivity"),
                "rank_budget",
            ):
                if getattr(self, option) != type(self).model_fields[option].default:
                    raise ValueError(
                        f"{option}: is about mixed widths; give {', '.join(BUDGETS[:-1])} or {BUDGETS[-1]}"
                    )
            return
        if not method.mixes_widths:
            those = ", ".join(name for name, row in METHODS.items() if row.mixes_widths)
            raise ValueError(f"method: mixed widths are for {those}, found {method.name}")
        if self.bits != 2:
            raise ValueError("bits: is one width for all; with ratio give bits_low and bits_high, else bits_choices")
        first, *more = (key for key in BUDGETS if getattr(self, key) is not None)
        if more:
            raise ValueError(f"{more[0]}: give it or {first}, not both")
        wrong = ("bits_choices",) if self.ratio is not None else ("bits_low", "bits_high")
        for option in wrong:
            if getattr(self, option) is not None:
                other = "target_bits or target_size" if self.ratio is not None else "ratio"
                raise ValueError(f"{option}: belongs to {other}, which is not given")
        if self.count_adapter and self.target_bits is None:
            raise ValueError("count_adapter: belongs to target_bits, which is not given")
        if self.joint and self.rank_budget is not None:
            raise ValueError("rank_budget: the adapter is part of the one budget; leave it out")
        if len(self.widths) < 2:
            raise ValueError(f"bits_low, bits_high, bits_choices: at least two widths are needed, found {self.widths}")
        if self.ratio is not None and (self.bits_low or 2) > (self.bits_high or 3):
            raise ValueError(f"bits_low: must be below bits_high, found {self.bits_low or 2} and {self.bits_high or 3}")
        for option in ("sensitivity", "rank_budget", "count_adapter", "target_size"):
            if getattr(self, option) and self.allocation != "sensitivity":
                raise ValueError(f"{option}: needs allocation sensitivity, found {self.allocation}")

    def _check_calibration(self, method: Method) -> None:
        if method.needs and self.calibration == "none":
            raise ValueError(f"calibration: method {self.method} needs it (self, text, a text file, ...), found none")
        takes = method.needs or method.name in CALIBRATED
        if self.calibrated and not takes:
            raise ValueError(f"calibration: method {self.method} looks at weights alone; leave it out or give none")
        if self.row.stages and self.calibration_mode != "sequential":
            raise ValueError(f"calibration_mode: method {self.method} needs sequential, found {self.calibration_mode}")
        if self.row.rounding == "gptq" and not GRIDS[self.row.grid].feeds_back:
            raise ValueError(f"rounding: gptq needs a grid that rounds under H, and {self.row.grid} has none")
        if self.calibration == "none":
            for option in ("text_field", "rounding", "act_order", "polish"):
                if getattr(self, option):
                    raise ValueError(f"{option}: needs calibration, which is none")
        for option in ("rounding", "act_order"):
            if getattr(self, option) and not method.adjustable:
                raise ValueError(f"{option}: method {method.name} has its own; leave it out")
        tokens = self.calibration_samples * self.calibration_length
        if tokens > MOST_TOKENS:
            raise ValueError(f"calibration_samples: {tokens} tokens in all, at most {MOST_TOKENS} are held in memory")
        if self.text_field and self.calibration in ("auto", *NAMED_TEXTS):
            raise ValueError(f"text_field: there is no field to name in calibration {self.calibration}")

    @property
    def mixed(self) -> bool:
        """Whether layers get different widths under a budget (MEQFT)."""
        return any(getattr(self, key) is not None for key in BUDGETS)

    @property
    def joint(self) -> bool:
        """Whether one budget is for base and adapter, so that groups and ranks are chosen with the widths."""
        return self.target_size is not None or self.count_adapter

    @property
    def chooses_ranks(self) -> bool:
        return self.joint or self.rank_budget is not None

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that a layer may get, ascending."""
        if self.ratio is not None:
            return tuple(sorted({self.bits_low or 2, self.bits_high or 3}))
        if self.ratio is None and self.mixed:
            return GRIDS[get_method(self.method).grid].bits if self.bits_choices is None else self.bits_choices
        return (self.bits,)

    @property
    def nominal_bits(self) -> float | None:
        """The width that the output is named after: on average, without scales where a ratio was asked for. None where
        a size is asked for."""
        if self.target_size is not None:
            return None
        if self.target_bits is not None:
            return self.target_bits
        low, high = self.widths[0], self.widths[-1]
        return low + (self.ratio or 0) * (high - low)

    @property
    def size_words(self) -> str:
        """What an output of this recipe is told from others by, as a part of a file's name."""
        size = self.target_size or f"{self.nominal_bits:g}bit"
        return size if self.joint else f"{size}-{self.rank}rank"

    @property
    def calibrated(self) -> bool:
        """Whether the method measures what the layers see; `auto` is no yes yet."""
        return self.calibration not in ("none", "auto")

    @property
    def polish_steps(self) -> int:
        """The steps of polish that are decided on; none while that is open."""
        return self.polish or 0

    @property
    def row(self) -> Method:
        """The method's row, with the recipe's own choice of grid and rounding."""
        row = get_method(self.method, calibrated=self.calibrated)
        row = on_grid(row, self.grid or "int") if row.name in STARTS and self.bits != 16 else row
        row = replace(row, grid="sym") if self.symmetric else row
        row = replace(row, factors="covariance-minor") if self.corda_method == "kpm" else row
        if self.base is not None and (row_on_base := on_base(row)) is not None:
            return row_on_base
        if not row.adjustable or not self.calibrated:
            return row
        return replace(row, rounding=self.rounding or row.rounding, act_order=self.act_order)

    @property
    def adapter(self) -> str:
        """The kind of adapter that is written."""
        return "dora" if self.use_dora else self.row.adapter

    @property
    def iterations(self) -> int:
        return self.row.iterations if self.iter is None or not self.row.adjustable else self.iter

    @property
    def alpha(self) -> float:
        return float(self.rank) if self.lora_alpha is None else self.lora_alpha

    @property
    def lora_scale(self) -> float:
        """s in W ~ Q + s B A: lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def make_recipe(file: Path | None = None, **options: Any) -> Recipe:
    """Build a recipe from a file, if given, and from options; options that are not None win.

    Raises RecipeError naming the key, what was expected and what was found.
    """
    values = read_recipe(file) if file else {}
    values.update({key: value for key, value in options.items() if value is not None})
    where = f"{file}: " if file else ""
    for key in values:
        if key not in Recipe.model_fields:
            known = ", ".join(Recipe.model_fields)
            hint = did_you_mean(str(key), Recipe.model_fields)
            raise RecipeError(f"{where}unknown recipe key '{key}'{hint}; known are {known}")
    try:
        return Recipe(**values)
    except ValidationError as error:
        raise RecipeError(where + "; ".join(_one_line(e) for e in error.errors())) from None


def _one_line(error: Any) -> str:
    option = ".".join(map(str, error["loc"]))
    if error["type"] == "value_error" and not option:
        return str(error["ctx"]["error"])
    message = error["msg"].removeprefix("Value error, ")
    return f"{option}: {message[0].lower() + message[1:]}, found {error['input']!r}"
