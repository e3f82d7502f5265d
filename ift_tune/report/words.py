"""Arms, numbers and findings as a reader meets them: in words and in colours."""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import pandas as pd

from ift_tune.base.direction import Direction
from ift_tune.base.statistics import Interval
from ift_tune.base.status import COARSE_PREFIX, SolveStatus
from ift_tune.compare.arms import ARMS
from ift_tune.compare.findings import ArmFindings, Findings
from ift_tune.compare.pairwise import Reach
from ift_tune.compare.verdict import capitalise, display_name, format_count
from ift_tune.search.analysis import LEAST_TRIALS

NOTHING = "–"
_COST_NAMES = {"gradient_equivalents": "gradient-equivalents", "wall_seconds": "seconds"}

# An absolute path at the end of an argument, which would tell of the machine: only its last part
# stays. What follows a letter, a dot or another slash is a relative path or an address.
_OFTEN = 0.05  # share of outer steps from which advice is given
_FINE = (SolveStatus.CONVERGED, SolveStatus.TRUNCATED)
_OTHER_COLORS = ("#a8605a", "#5a7fa8", "#7d8f4e", "#9a6fa0")


class ArmStyle(NamedTuple):
    """An arm in figures and tables. Colour is never the only difference: dashes and marks differ.

    Attributes:
        label: Its name.
        color: To be read on white and on near-black.
        dashes: Lengths of strokes and gaps, in line widths; empty for a whole line.
        marker: Matplotlib's name of its mark.
    """

    label: str
    color: str
    dashes: tuple[float, ...]
    marker: str

    @property
    def line(self) -> dict[str, Any]:
        """Matplotlib's arguments for a line."""
        style: Any = (0, self.dashes) if self.dashes else "-"
        return {"label": self.label, "color": self.color, "linestyle": style} | self.mark

    @property
    def mark(self) -> dict[str, Any]:
        """Matplotlib's arguments for its mark."""
        return {"marker": self.marker, "markersize": 4.5}


def arm_style(name: str) -> ArmStyle:
    """Return how an arm is drawn; one that we do not know has one of four other colours."""
    if name in ARMS:
        arm = ARMS[name]
        return ArmStyle(arm.label, arm.style.color, arm.style.dashes, arm.style.marker)
    # Not Python's own hash, which differs from process to process.
    color = _OTHER_COLORS[zlib.crc32(name.encode()) % len(_OTHER_COLORS)]
    return ArmStyle(name, color, (2, 2), "x")


def arm_label(name: str) -> str:
    """Return what figures and tables call an arm."""
    return arm_style(name).label


def format_number(value: float, digits: int = 4) -> str:
    """Return some significant digits; a dash for what is not known."""
    if math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value + 0.0:.{digits}g}".replace("-", "−")  # + 0: no minus before a zero


def format_amount(value: float) -> str:
    """Return a cost or a time; a large one without digits behind the point."""
    if math.isnan(value):
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 100 else format_number(value, 3)


def format_interval(interval: Interval) -> str:
    """Return the interval alone, as "[0.1, 0.2]"; nothing for a single value."""
    if math.isnan(interval.low):
        return ""
    return f"[{format_number(interval.low, 3)}, {format_number(interval.high, 3)}]"


def format_mean(interval: Interval) -> str:
    """Return the mean with its interval, as "0.15 [0.1, 0.2]"."""
    return f"{format_number(interval.mean)} {format_interval(interval)}".strip()


def format_p_value(p: float) -> str:
    """Return a p-value with two digits."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def format_share(share: float) -> str:
    """Return a share in percent; one below 1 % but above 0 is not rounded to nothing."""
    return "< 1 %" if 0.0 < share < 0.005 else f"{100.0 * share:.0f} %"


def format_reach(reach: Reach) -> str:
    """Return how much cheaper the reference reaches what the other arm found, and how often."""
    if not reach.seeds:
        return NOTHING
    missed = reach.seeds - reach.reached
    if reach.ratio == 0.0:
        return f"not reached in {missed} of {format_count(reach.seeds, 'seed')}"
    factor = f"{max(reach.ratio, 1.0 / reach.ratio):.2g}"
    how = f"{factor} times {'cheaper' if reach.ratio > 1.0 else 'dearer'}"
    if factor == "1":
        how = "as dear"
    if missed:
        return f"{how}; not reached in {missed} of {format_count(reach.seeds, 'seed')}"
    return f"{how} ({reach.reached} of {format_count(reach.seeds, 'seed')})"


def cost_name(findings: Findings) -> str:
    """Return the unit of the budget."""
    return _COST_NAMES[findings.cost]


def metric_name(column: str) -> str:
    """Return a column of a metric as words: "search error"."""
    return column.replace("_", " ")


def aimed_name(findings: Findings, name: str) -> str:
    """Return a name for an axis, with the direction where it is not the usual one."""
    return f"{name}, {findings.direction.words}" if findings.direction is Direction.MAX else name


def status_name(status: str) -> str:
    """Return a status as words: "negative curvature"."""
    return status.replace("_", " ")


def parameter_name(column: str) -> str:
    """Return a searched parameter without the prefix of its column."""
    return column.removeprefix(COARSE_PREFIX)


def gap_sentences(findings: Findings) -> list[str]:
    """Say how much better the choices looked than they are."""
    listed = ", ".join(f"{arm_label(arm.name)} {_signed(arm.optimism)}" for arm in findings.arms)
    sentences = [
        f"{capitalise(optimism_name(findings))}, on average: {listed}. "
        "The best of many looks better than it is, so a little above 0 is normal; below 0 the "
        "search split is the harder one."
    ]
    sentences += [
        f"{capitalise(display_name(arm.name))} fits its hyperparameters to the validation split. "
        f"At the weights of the choice its test {findings.measure} was "
        f"{format_number(abs(arm.val_test_gap))} "
        f"{'above' if arm.val_test_gap * findings.direction.sign > 0 else 'below'} that of the "
        f"validation split{_over(arm)}"
        + (
            ": the larger this gap, the more they overfit it."
            if arm.val_test_gap > 0
            else ", so nothing says that they overfit it."
        )
        for arm in findings.arms
        if math.isfinite(arm.val_test_gap)
    ]
    return sentences


def optimism_name(findings: Findings) -> str:
    """Return what is subtracted from what where 0 means that a choice is as good as it looked."""
    test, search = (
        f"test {findings.measure} after retraining",
        "the search value by which it was chosen",
    )
    if findings.direction is Direction.MAX:
        return f"{search} minus {test}"
    return f"{test} minus {search}"


def _over(arm: ArmFindings) -> str:
    """Say over how many seeds a gap is the mean, where some have no finite test value."""
    if arm.gap_seeds == arm.seeds:
        return ""
    return f" (in {arm.gap_seeds} of {format_count(arm.seeds, 'seed')})"


def learned_sentences(findings: Findings) -> list[str]:
    """Return what λ has learned, in the words of its kinds, of the best search of each arm."""
    trials = findings.results.trials
    if "learned_words" not in trials:
        return []
    said = trials.set_index(["arm", "seed", "trial"])["learned_words"].dropna()
    sentences = []
    for arm in findings.arms:
        own = findings.chosen[findings.chosen["arm"] == arm.name]
        keys = own[["arm", "seed", "trial"]].apply(tuple, axis="columns")
        own = own[[key in said.index for key in keys]]
        if len(own):
            best = findings.direction.best_row(own, "search")
            words = str(said[best["arm"], best["seed"], best["trial"]]).rstrip(".")
            sentences.append(f"{arm_label(arm.name)}, seed {best['seed']}: {words}.")
    return sentences


def health_sentences(findings: Findings) -> list[str]:
    """Say how the linear solves went, and what to do where they often went wrong."""
    arms = findings.outer_steps
    if not arms:
        return ["No arm of this comparison uses hypergradients."]
    shares = {name: status_shares(steps) for name, steps in arms.items()}
    wrong = [
        status
        for status in SolveStatus
        if status not in _FINE and any(s.get(status.value, 0.0) >= _OFTEN for s in shares.values())
    ]
    advice = [
        f"{capitalise(status_name(status.value))}: {status.advice.replace('`', '')}"
        for status in wrong
    ]
    return [*(_health(name, steps, shares[name]) for name, steps in arms.items()), *advice]


def search_sentences(findings: Findings) -> list[str]:
    """Say which arms have too few trials for an importance."""
    if not findings.searches:
        return ["Every arm ran a single trial for each seed, so there is no search to look into."]
    few = {
        name: len(trials.complete)
        for name, trials in findings.searches.items()
        if len(trials.complete) < LEAST_TRIALS and trials.parameters
    }
    if not few:
        return []
    listed = ", ".join(f"{arm_label(name)} has {count}" for name, count in few.items())
    return [f"Importance takes at least {LEAST_TRIALS} complete trials: {listed}."]


def status_shares(steps: pd.DataFrame) -> pd.Series[float]:
    """Return the share of each `SolveStatus` among outer steps, the largest first."""
    # By name before by share: equal shares come in the same order whatever the rows' order.
    shares = steps["solve_status"].value_counts(normalize=True).sort_index()
    return shares.sort_values(ascending=False, kind="stable")


def _health(name: str, steps: pd.DataFrame, shares: pd.Series[float]) -> str:
    parts = [f"{format_share(share)} {status_name(str(s))}" for s, share in shares.items()]
    text = f"{capitalise(display_name(name))}: linear solves {', '.join(parts)}"
    for column, words in (
        ("relative_residual", "median relative residual"),
        ("alpha_lambda_max", "median α·λ_max"),
    ):
        if column in steps and steps[column].notna().any():
            text += f"; {words} {format_number(float(steps[column].median()))}"
    if "skipped" in steps:
        left = format_share(float(steps["skipped"].mean()))
        text += f"; λ left as it was in {left} of outer steps"
    return f"{text}."


def _signed(value: float) -> str:
    return f"+{format_number(value)}" if value > 0 else format_number(value)
