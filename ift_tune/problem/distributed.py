"""Models that several processes train together are refused."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ift_tune.base.errors import UsageError

_REPLICATED = {"DistributedDataParallel", "ReplicateModule", "DDP"}
_SHARDED = {"FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"}


def refuse_distributed(modules: Iterable[object]) -> None:
    """Raise a `UsageError` if one of the modules, or a part of it, belongs to several processes.

    Their hooks average what ``loss.backward()`` leaves in ``.grad``. A hypergradient is made of
    other products, which nobody averages, so that each process would have a λ of its own.

    Args:
        modules: Whatever a problem holds; what is no module is passed over.
    """
    for module in modules:
        if not isinstance(module, nn.Module):
            continue
        for part in module.modules():
            if wrapper := _wrapper(part):
                raise UsageError(
                    "hypergradients are not averaged over processes, so that λ would differ "
                    "between them: give the plain model, and use more GPUs by processes that "
                    "share a trial (processes_per_trial=2) or by trials side by side "
                    f"(run_study(..., workers=2)), got a model in {wrapper}"
                )


def _wrapper(part: nn.Module) -> str | None:
    """Return the name of what spreads a module over processes; None if nothing does."""
    names = {kind.__name__ for kind in type(part).__mro__}
    if sharded := names & _SHARDED:
        return min(sharded)
    if any(type(p).__name__ == "DTensor" for p in part.parameters(recurse=False)):
        return "DTensor"
    if replicated := names & _REPLICATED:
        # Among one process there is nothing to average.
        group = getattr(part, "process_group", None)
        return None if group is not None and group.size() == 1 else min(replicated)
    return None
