"""How much memory an outer step may take, and in which parts its batches keep to that."""

from __future__ import annotations

import re

from ift_tune.base.errors import UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)(I?)B?\s*", re.IGNORECASE)


def parse_bytes(name: str, value: object) -> int:
    """Return a number of bytes, given as a number or as a text: "2GB", "512 MiB".

    Raises:
        UsageError: If it is neither, or not above 0.

    Example:
        >>> from ift_tune.joint.memory import parse_bytes
        >>> parse_bytes("memory_budget", "1.5 GB"), parse_bytes("memory_budget", "2MiB")
        (1500000000, 2097152)
    """
    found: float | None = None
    if isinstance(value, str) and (parts := _SIZE.fullmatch(value)):
        number, unit, binary = parts.groups()
        power = "KMGT".find(unit.upper()) + 1 if unit else 0
        found = float(number) * (1024**power if binary else _UNITS[unit.upper()])
    elif isinstance(value, int | float) and not isinstance(value, bool):
        found = float(value)
    if found is None or not 1.0 <= found < 2.0**62:
        raise UsageError(
            f"{name} must be a number of bytes above 0 or a text such as '2GB', got {value!r}"
        )
    return int(found)
