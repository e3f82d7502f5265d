"""The laws of each family, for the package's own members and for anyone's: call them in a test."""

from typing import TYPE_CHECKING

from ift_tune.base.errors import lazy_names

if TYPE_CHECKING:
    from ift_tune.testing.contracts.arm import check_arm
    from ift_tune.testing.contracts.inverse import check_inverse
    from ift_tune.testing.contracts.kind import check_kind
    from ift_tune.testing.contracts.task import check_task

__getattr__, __dir__ = lazy_names(  # each knows its family alone
    __name__,
    {
        "check_arm": "ift_tune.testing.contracts.arm",
        "check_inverse": "ift_tune.testing.contracts.inverse",
        "check_kind": "ift_tune.testing.contracts.kind",
        "check_task": "ift_tune.testing.contracts.task",
    },
)

__all__ = ["check_arm", "check_inverse", "check_kind", "check_task"]
