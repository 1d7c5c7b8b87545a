"""The options of SNN-DLFT, checked once."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qinit.errors import RecipeError, did_you_mean


class SnnDlftConfig(BaseModel):
    """What SNN-DLFT does. `target_r` to `beta2` are AdaLoRA's (arXiv:2303.10512), by PEFT's names; steps are those of
    the optimizer.

    `layer_wise`: after `tinit` steps, every `deltaT` steps, the layers that train on are chosen anew: the best one
    (`single`), the better half (`half`), or always all; the last `tfinal` steps keep ranks and layers.

    `spiking`: what goes from Q to P are spikes of leaky integrate-and-fire neurons over `time_steps` steps, whose
    potential keeps a share of `decay` from step to step and which fire above `threshold`.

    `target_modules` is a name, several, a regular expression or all-linear, as PEFT takes them; None: PEFT's own choice
    for AdaLoRA on this kind of model, and all-linear where it has none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    target_r: int = Field(8, ge=1, le=2**16)
    init_r: int = Field(12, ge=2, le=2**16)
    deltaT: int = Field(1, ge=1)  # noqa: N815 - PEFT's name
    tinit: int = Field(0, ge=0)
    tfinal: int = Field(0, ge=0)
    layer_wise: Literal["single", "half", "all"] = "half"
    spiking: bool = True
    time_steps: int = Field(4, ge=1, le=256)
    decay: float = Field(0.9, ge=0, le=1, allow_inf_nan=False)
    threshold: float = Field(1.0, gt=0, le=1e6, allow_inf_nan=False)
    beta1: float = Field(0.85, gt=0, lt=1, allow_inf_nan=False)
    beta2: float = Field(0.85, gt=0, lt=1, allow_inf_nan=False)
    orth_reg_weight: float = Field(0.5, ge=0, le=1e6, allow_inf_nan=False)
    lora_alpha: int = Field(32, ge=1, le=2**16)
    lora_dropout: float = Field(0.0, ge=0, lt=1, allow_inf_nan=False)
    target_modules: str | tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _ranks_fit(self) -> SnnDlftConfig:
        if self.target_r >= self.init_r:
            raise ValueError(
                f"target_r: must be below init_r, as ranks are only taken away, found {self.target_r} and {self.init_r}"
            )
        return self

    @property
    def name(self) -> str:
        """What the configuration is called in reports."""
        kind = "spiking AdaLoRA" if self.spiking else "AdaLoRA"
        return kind if self.layer_wise == "all" else f"{kind}, {self.layer_wise}"

    def require_steps(self, steps: int) -> None:
        """Raise RecipeError where a run of so many steps has no room for the schedule."""
        room = steps - self.tinit - self.tfinal
        if room < 1:
            raise RecipeError(
                f"tinit, tfinal: {self.tinit} and {self.tfinal} steps leave none to allocate ranks in a run of "
                f"{steps}; make them smaller or the run longer"
            )
        if self.deltaT > room:
            raise RecipeError(
                f"deltaT: {self.deltaT} is beyond the {room} steps of this run between tinit and tfinal; "
                "make it smaller"
            )


def make_config(**options: Any) -> SnnDlftConfig:
    """Build a configuration from those options that are not None. Raises RecipeError, one line, naming the option."""
    values = {key: value for key, value in options.items() if value is not None}
    for key in values:
        if key not in SnnDlftConfig.model_fields:
            hint = did_you_mean(key, SnnDlftConfig.model_fields)
            raise RecipeError(f"unknown option '{key}'{hint}; known are {', '.join(SnnDlftConfig.model_fields)}")
    try:
        return SnnDlftConfig(**values)
    except ValidationError as error:
        raise RecipeError("; ".join(map(_one_line, error.errors()))) from None


def _one_line(error: Any) -> str:
    option = ".".join(map(str, error["loc"]))
    message = error["msg"].removeprefix("Value error, ")
    return f"{option}: {message[0].lower() + message[1:]}, found {error['input']!r}" if option else message
