"""Locks between processes that die with their holder."""

from __future__ import annotations

from typing import Any

from filelock import FileLock, Timeout

from ift_tune.base.faults import as_fault


class ProcessLock(FileLock):
    """A lock by a file, on which whatever the system refuses is no fault of the program."""

    def acquire(self, *args: Any, **options: Any) -> Any:
        """Wait for the lock.

        Raises:
            Timeout: If another process holds it for as long as it is waited for.
            EnvironmentFaultError: If the file cannot be made or locked.
        """
        try:
            return super().acquire(*args, **options)
        except Timeout:  # is an OSError too
            raise
        except OSError as error:
            raise as_fault(f"{self.lock_file} cannot be locked", error) from error
