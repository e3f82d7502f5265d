"""Numbers and names as a reader sees them."""

from __future__ import annotations

import math
import re

from ift_tune.base.statistics import Interval
from ift_tune.compare.against import Reach
from ift_tune.compare.findings import Findings

NOTHING = "–"
COSTS = {"gradient_equivalents": "gradient-equivalents", "wall_seconds": "seconds"}
COARSE_PREFIX = "knob."

# An absolute path at the end of an argument, which would tell of the machine: only its last part
# stays. What follows a letter, a dot or another slash is a relative path or an address.
_PATH = re.compile(r"(?<![\w.:/\\])(?:~[^/\\]*[/\\]|/|[A-Za-z]:[\\/]).*?([^/\\]+)[/\\]*$")


def number(value: float, digits: int = 4) -> str:
    """Return some significant digits; a dash for what is not known."""
    if math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value + 0.0:.{digits}g}".replace("-", "−")  # + 0: no minus before a zero


def amount(value: float) -> str:
    """Return a cost or a time; a large one without digits behind the point."""
    if math.isnan(value):
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 100 else number(value, 3)


def between(interval: Interval) -> str:
    """Return the interval alone, as "[0.1, 0.2]"; nothing for a single value."""
    if math.isnan(interval.low):
        return ""
    return f"[{number(interval.low, 3)}, {number(interval.high, 3)}]"


def p_value(p: float) -> str:
    """Return a p-value with two digits."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def seeds(count: int) -> str:
    """Return "1 seed", "2 seeds"."""
    return f"{count} seed{'s' * (count != 1)}"


def percent(share: float) -> str:
    """Return a share in percent; one below 1 % but above 0 is not rounded to nothing."""
    return "< 1 %" if 0.0 < share < 0.005 else f"{100.0 * share:.0f} %"


def reach(found: Reach) -> str:
    """Return how much cheaper the reference reaches what the other arm found, and how often."""
    if not found.seeds:
        return NOTHING
    missed = found.seeds - found.reached
    if found.ratio == 0.0:
        return f"not reached in {missed} of {seeds(found.seeds)}"
    factor = f"{max(found.ratio, 1.0 / found.ratio):.2g}"
    how = f"{factor} times {'cheaper' if found.ratio > 1.0 else 'dearer'}"
    if factor == "1":
        how = "as dear"
    if missed:
        return f"{how}; not reached in {missed} of {seeds(found.seeds)}"
    return f"{how} ({found.reached} of {seeds(found.seeds)})"


def cost_name(findings: Findings) -> str:
    """Return the unit of the budget."""
    return COSTS[findings.cost]


def metric_name(column: str) -> str:
    """Return a column of a metric as words: "search error"."""
    return column.replace("_", " ")


def parameter_name(column: str) -> str:
    """Return a searched parameter without the prefix of its column."""
    return column.removeprefix(COARSE_PREFIX)


def without_paths(text: str) -> str:
    """Return the text with an absolute path cut down to its last part: "--out=…/run"."""
    return _PATH.sub(r"…/\1", text)
