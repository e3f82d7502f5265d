"""What Ray must be told before it is imported, for a search on this machine alone.

Not in the room ``ray/``, whose import imports Ray.
"""

from __future__ import annotations

import os

_LOCAL = {
    # Ray's switch for systems on which it forms no clusters: all its sockets are then bound to the
    # loopback interface. Without it, they listen on every interface of the machine.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean what they mean in this process
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the first one is raised
    # A snapshot follows each checkpoint, so that a kill loses nothing; we know that.
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def prepare(*, local: bool) -> None:
    """Set Ray's variables where the user has not.

    Args:
        local: Whether Ray is to be started here and not joined elsewhere.
    """
    for name, value in (_QUIET | (_LOCAL if local else {})).items():
        os.environ.setdefault(name, value)
