"""What a run costs at a nominal speed, counted from headers alone.

What `auto` chooses, and on how many tokens a run is measured at its end, depends on these figures: never on how fast
this machine is just now, so that a busy one writes the same bytes as an idle one. How long a run will take here is what
`planner/time.py` estimates.
"""

from __future__ import annotations

from qinit.plan.limits import GRADIENT_LENGTH, GRADIENT_PASSES, GRADIENT_SAMPLES
from qinit.plan.plan import Plan
from qinit.recipe import SELF
from qinit.source.targets import LinearModule
from qinit.text.self_text import LARGEST_BATCH
from qinit.train.polish import BATCH_TOKENS, EPOCHS, polish_flops

# Floating-point operations per second that a model reaches: on two to four cores, on a card for games.
SPEED = {"cpu": 1.1e11, "cuda": 9e12}
WRITING = 4  # operations per parameter and token that is written: 2 are arithmetic, the rest goes to keys and values
STEP_SECONDS = 4e-4  # per layer of the model: what writing one more token for a whole batch takes beside its arithmetic
# Over the text: the original and the repaired up to each group make 2.7, but a block is not its layers alone.
WALK_PASSES = {"sequential": 4, "parallel": 1.5}
SOLVING, SOLVING_CALIBRATED = 4e4, 1.3e5  # operations per weight; with calibration also in proportion to its inputs
CHECKING = 10  # operations per parameter and token: 2 x 2 in matrix products, the rest in norms, softmax and unpacking
CHECK_SHARE = 0.1  # of the run's time that its check takes at most
LEAST_CHECKED, LEAST_CHECKED_WITHOUT = 2048, 1024  # tokens; a run without calibration is soon done
INPUTS_OF_HALF = 4000  # where what grows with the inputs is half of it


def calibrating_seconds(plan: Plan, source: str, samples: int) -> float:
    """Return what it takes to write the text, where the model does, and to run the model over it."""
    recipe, speed = plan.recipe, SPEED[_kind(plan)]
    length = plan.facts.clip(recipe.calibration_length)
    parameters = active_parameters(plan)
    weights = sum(layer.weights * share(plan, layer.target.module) for layer in plan.quantized)
    squares = sum(layer.target.module.in_features**2 * share(plan, layer.target.module) for layer in plan.quantized)
    operations = (2 * WALK_PASSES[recipe.calibration_mode] * weights + 2 * squares) * samples * length
    operations += 2 * GRADIENT_PASSES * parameters * min(samples * length, GRADIENT_SAMPLES * GRADIENT_LENGTH)
    if source != SELF:
        return operations / speed
    parts = len({layer.target.name.rsplit(".", 1)[0] for layer in plan.quantized})
    steps = length * -(-samples // LARGEST_BATCH[_kind(plan)])
    return (operations + WRITING * parameters * samples * length) / speed + STEP_SECONDS * parts * steps


def share(plan: Plan, module: LinearModule) -> float:
    """Return the share of the tokens that reach a layer: of experts, what each gets."""
    routed = module.expert is not None or ("experts" in module.name.split(".") and "shared" not in module.name)
    return plan.routed if routed else 1.0


def active_parameters(plan: Plan) -> float:
    """Return how many of the model's parameters a token meets."""
    experts = (module for module in plan.architecture.modules.values() if module.expert is not None)
    idle = sum(m.in_features * m.out_features * (1 - share(plan, m)) for m in experts)
    return plan.checkpoint.parameters - idle


def solving_seconds(plan: Plan, calibrated: bool) -> float:
    """Return what it takes to solve all layers."""
    if not calibrated:
        return SOLVING * sum(layer.weights for layer in plan.quantized) / SPEED[_kind(plan)]
    sizes = ((layer.weights, layer.target.module.in_features) for layer in plan.quantized)
    return SOLVING_CALIBRATED * sum(n * (1 + inputs / INPUTS_OF_HALF) for n, inputs in sizes) / SPEED[_kind(plan)]


def run_seconds(plan: Plan) -> float:
    """Return what a plan's run takes, without its polish and its check."""
    recipe = plan.recipe
    solving = solving_seconds(plan, recipe.calibrated)
    if not recipe.calibrated:
        return solving
    return solving + calibrating_seconds(plan, recipe.calibration, recipe.calibration_samples)


def polishing_seconds(plan: Plan, steps: int) -> float:
    """Return what so many steps of polish take, with the source's pass over their text."""
    tokens = steps * BATCH_TOKENS
    parameters = active_parameters(plan)
    reading = 2.0 * parameters * tokens / EPOCHS
    return (reading + polish_flops(parameters, BATCH_TOKENS, steps)) / SPEED[_kind(plan)]


def checking_seconds(plan: Plan, tokens: int) -> float:
    """Return what it takes to run the original and what was made of it over so many tokens, forward."""
    return CHECKING * active_parameters(plan) * tokens / SPEED[_kind(plan)]


def check_tokens(plan: Plan) -> int:
    """Return on how many tokens a run is measured at its end: under a tenth of its time, within the bounds, in powers
    of two."""
    least = LEAST_CHECKED if plan.recipe.calibrated else LEAST_CHECKED_WITHOUT
    share = CHECK_SHARE * run_seconds(plan)
    sizes = (size for size in (8192, 4096, 2048, 1024) if size >= least)
    return next((size for size in sizes if checking_seconds(plan, size) <= share), least)


def _kind(plan: Plan) -> str:
    return plan.device.type
