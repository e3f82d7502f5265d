"""Points that a study tries first, because its user says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ift_tune.base.arguments import plain, require_instance, require_list, shown
from ift_tune.base.errors import UsageError, nearest
from ift_tune.search.distributions import Choice
from ift_tune.search.space import Space


def points_of(space: Space | None, points: object) -> list[dict[str, Any]]:
    """Return enqueued points as plain values.

    Args:
        space: What varies.
        points: A list of mappings, each with some of its keys.

    Raises:
        UsageError: If one is no point of the space.
    """
    found = require_list("enqueue", points, "points such as {'terms': 3}")
    if found and space is None:
        raise UsageError(f"there is nothing to search: give a space, got enqueue={shown(found)}")
    return [] if space is None else [_point_of(space, point) for point in found]


def _point_of(space: Space, point: Mapping[str, Any]) -> dict[str, Any]:
    require_instance("a point of enqueue", point, Mapping, "a mapping such as {'terms': 3}")
    values = {key: plain(value) for key, value in point.items()}
    for key, value in values.items():
        if key not in space.distributions:
            raise UsageError(f"enqueue: {key} is not searched{nearest(key, space.distributions)}")
        d = space.distributions[key]
        if not d.holds(value):
            raise UsageError(f"enqueue: {key} must lie in its range {d}, got {shown(value)}")
        if not isinstance(d, Choice):
            values[key] = d.nearest(value)
    return values
