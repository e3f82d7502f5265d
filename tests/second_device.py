"""Runs problems on a device that is none: the CPU's numbers, and a GPU's rules and books.

A program of its own (``python tests/second_device.py small|large|trials``), since a process has one
such device for good, which must be there before its first backward pass. It prints what it found as
JSON, by case: the rows on both devices and what the second one was asked for in each outer step.

What holds a tensor of the device is a subclass that PyTorch takes to be elsewhere. An operation on
it is counted, done on the CPU's tensors inside, and refused where tensors of both devices meet.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import optuna
import torch
from torch import Tensor, nn
from torch.utils import backend_registration

import ift_tune
from ift_tune import tasks
from ift_tune.base import environment as base_environment
from ift_tune.hyper import KINDS
from ift_tune.implicit.inverse import INVERSES
from ift_tune.joint.joint import JointOptimizer
from ift_tune.joint.packed import Member, Pack
from ift_tune.trial import runner

NAME = "second"
PACKED: dict[str, dict[str, Any]] = {
    "neumann": {"alpha": 0.05, "terms": 3},
    "conjugate_gradient": {"max_steps": 4},
    "identity": {},
}
WAITS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")
CARRIES = ("aten::_to_copy", "aten::copy_")


@dataclass
class Books:
    """What the device was asked for: numbers waited for, tensors carried, operations.

    And kernels, which are operations other than views.
    """

    waits: int = 0
    carried: int = 0
    operations: int = 0
    kernels: int = 0


books = Books()


class Elsewhere(Tensor):
    """A tensor that PyTorch takes to be on the second device."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> Elsewhere:
        made: Any = Tensor._make_wrapper_subclass(
            cls,
            inside.shape,
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device=torch.device(NAME, 0),
        )
        made.inside = inside
        elsewhere: Elsewhere = made
        return elsewhere

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return perform(func, args, kwargs or {})


def perform(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do an operation of the second device on the CPU."""
    name = func._schema.name
    books.operations += 1
    books.kernels += not func.is_view
    books.waits += name in WAITS
    given: list[Tensor] = []
    each_tensor(given.append, (args, kwargs))
    ours = {id(x.inside): x for x in given if isinstance(x, Elsewhere)}
    # A lone number may come from the host, as on a GPU.
    foreign = any(not isinstance(x, Elsewhere) and x.ndim for x in given)
    target = bool(ours)
    if (device := kwargs.get("device")) is not None:
        target = torch.device(device).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if name in CARRIES:
        books.carried += (foreign and bool(ours)) or target != bool(ours)
    elif foreign and ours:
        raise RuntimeError(f"{name} got tensors of two devices")
    args, kwargs = each_tensor(
        lambda x: x.inside if isinstance(x, Elsewhere) else x, (args, kwargs)
    )
    result = func(*args, **kwargs)

    def outside(x: Tensor) -> Tensor:
        if isinstance(x, Elsewhere):
            return x
        return ours[id(x)] if id(x) in ours else Elsewhere(x)

    return each_tensor(outside, result) if target else result


def each_tensor(call: Callable[[Tensor], Any], tree: Any) -> Any:
    """Return a tree of what is made of each tensor; PyTorch's own takes longer than all else."""
    if isinstance(tree, Tensor):
        return call(tree)
    if isinstance(tree, dict):
        return {name: each_tensor(call, x) for name, x in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)([each_tensor(call, x) for x in tree])
    return tree


class Backend:
    """What PyTorch asks of the module of a device."""

    is_available = is_initialized = lambda self: True
    _is_in_bad_fork = lambda self: False  # noqa: E731
    device_count = lambda self: 1  # noqa: E731
    current_device = lambda self: 0  # noqa: E731
    get_rng_state = lambda self, device=None: torch.get_rng_state()  # noqa: E731
    set_rng_state = lambda self, state, device=None: torch.set_rng_state(state)  # noqa: E731
    manual_seed_all = synchronize = lambda self, *_: None
    get_amp_supported_dtype = lambda self: [torch.bfloat16]  # noqa: E731


def open_device() -> Any:
    """Make the device; what is returned has to be kept."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    library: Any = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
    library.fallback(lambda op, *args, **kwargs: perform(op, args, kwargs), "PrivateUse1")
    return library


@contextmanager
def counted() -> Iterator[Books]:
    """Yield what is asked for inside."""
    before, found = replace(books), Books()
    yield found
    for name, value in asdict(books).items():
        setattr(found, name, value - getattr(before, name))


Make = Callable[[torch.device], ift_tune.BilevelProblem]


def compare(make: Make, config: ift_tune.MetaConfig, steps: int = 3) -> dict[str, Any]:
    """Return the rows of a problem on both devices, and what the second was asked for by step."""
    config = replace(config, start_check=False)  # which waits for its numbers, once
    rows: dict[str, list[Any]] = {"cpu": [], NAME: []}
    asked = []
    for device in rows:
        joint = JointOptimizer(make(torch.device(device)), config)
        for _ in range(steps):
            with counted() as found:
                row = joint.step()
            rows[device].append({**row, "status": str(joint.status)})
            if device == NAME:
                asked.append(asdict(found))
    return {"cpu": rows["cpu"], "second": rows[NAME], "asked": asked}


Cases = Iterator[tuple[str, Make, ift_tune.MetaConfig]]


def is_large(task: str) -> bool:
    """Return whether a task is on colour images, with nets to match."""
    return task.startswith("cifar") and not task.endswith("distill")


def make_task(
    task: tasks.Task, config: ift_tune.MetaConfig, device: torch.device
) -> ift_tune.BilevelProblem:
    """Return a task's problem."""
    return task.make_problem(config, device, 0)


def of_tasks(large: bool = False) -> Cases:
    """Yield every task of a size, with few inner steps."""
    for name in [name for name in tasks.TASKS if is_large(name) is large]:
        task = tasks.get(name, embedded=True)
        config = task.default_config.updated({"inner_steps": 2})
        yield name, partial(make_task, task, config), config
    if not large:
        task = tasks.get("digits-weight-decay", embedded=True)
        config = task.default_config
        yield "all inner steps", partial(make_task, task, config), config


def small(device: torch.device, kind: str = "weight_decay") -> ift_tune.ClassificationProblem:
    """Return a small classifier of images with a kind of hyperparameters."""
    torch.manual_seed(0)
    inputs, targets = torch.rand(24, 2, 4, 4).to(device), (torch.arange(24) % 3).to(device)
    model: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
    if kind == "dropout_rates":
        model = nn.Sequential(nn.Flatten(), nn.Linear(32, 4), nn.Dropout(0.2), nn.Linear(4, 3))
    model.to(device)
    train = ift_tune.Batches(
        inputs, targets, torch.arange(24).to(device), batch_size=7, shuffle=True, seed=1
    )
    other = ift_tune.Batches(inputs, targets, batch_size=10, seed=2)
    hyper = KINDS[kind].example(model, inputs)
    return ift_tune.ClassificationProblem(model, hyper, ift_tune.Splits(train, other, other, other))


def of_kinds() -> Cases:
    """Yield every kind of hyperparameters."""
    config = ift_tune.MetaConfig(inner_steps=3, meta_lr=0.05, inner_lr=0.02)
    for kind in KINDS:
        yield kind, partial(small, kind=kind), config


def of_signals() -> Cases:
    """Yield a problem of several kinds with and without a measurement of its signal."""
    task = tasks.get("digits-cleaning", embedded=True)
    for every in (0, 1):
        config = task.default_config.updated({"inner_steps": 2, "signal_every": every})
        yield f"signal {every}", partial(make_task, task, config), config


def of_inverses() -> Cases:
    """Yield every inverse with each of its examples, warm and cold."""
    for kind in INVERSES.values():
        for inverse in kind.examples():
            config = ift_tune.MetaConfig(
                inverse, inner_steps=2, inner_lr=0.02, meta_lr=0.05, warm_start=kind.refines
            )
            yield repr(inverse), small, config


def packed(inverse: str, members: int = 4, steps: int = 3) -> dict[str, Any]:
    """Return the rows of packed runs on both devices, and what each step asks of the second.

    What is asked for is that of one run alone, and that of all members of the pack.
    """
    task = tasks.get("digits-weight-decay", embedded=True)
    settings = {"inverse": inverse, "start_check": False, **PACKED[inverse]}
    configs = [
        task.default_config.updated({**settings, "meta_lr": 0.02 * (i + 1), "inner_steps": 3})
        for i in range(members)
    ]
    rows: dict[str, list[Any]] = {"cpu": [], NAME: []}
    asked = []
    for name in rows:
        device = torch.device(name)
        joints = [JointOptimizer(make_task(task, c, device), c) for c in configs]
        pack = Pack(make_task(task, configs[0], device))
        together = [Member(j, learns=True, ground=pack.ground(j.problem)) for j in joints]
        alone = JointOptimizer(make_task(task, configs[0], device), configs[0])
        for _ in range(steps):
            with counted() as one:
                alone.step()
            with counted() as all_:
                pack.advance(together)
                found = [joint.step() for joint in joints]
            rows[name] += found
            if name == NAME:
                asked.append({"alone": asdict(one), "packed": asdict(all_)})
    return {"cpu": rows["cpu"], "second": rows[NAME], "asked": asked}


def trials(pack: int, outer_steps: int = 40) -> dict[str, float]:
    """Return the kernels of a trial of a search that is run alone, and of one in a pack.

    Evaluations and retraining included; without the check at the start, whose saved tensors the
    device cannot have, and without checkpoints on the way, for it has no memory to copy.
    """
    task = tasks.get("digits-weight-decay")
    space = {
        "meta_lr": ift_tune.Float(0.01, 0.1, log=True),
        "inner_lr": ift_tune.Float(1e-3, 1e-2, log=True),
        "alpha_scale": ift_tune.Float(0.3, 1.0),
    }
    found = {}
    for size in (1, pack):
        with tempfile.TemporaryDirectory() as folder, counted() as asked:
            ift_tune.run_study(
                task.make_problem,
                ift_tune.MetaSpace(space),
                ift_tune.Budget(outer_steps=outer_steps),
                n_trials=size,
                out=os.path.join(folder, "run"),
                config=task.default_config.updated({"start_check": False}),
                device=NAME,
                sampler="random",
                storage=optuna.storages.InMemoryStorage(),
                pack=size,
            )
        found["alone" if size == 1 else "packed"] = asked.kernels / size
    return found


def admit_device() -> None:
    """Let a search run on the device, where else it takes a processor or a GPU alone."""
    own = base_environment.resolve_device

    def resolve(name: str | torch.device) -> torch.device:
        return torch.device(NAME) if str(name) == NAME else own(name)

    importlib.import_module("ift_tune.search.study")
    for module in list(sys.modules.values()):
        if getattr(module, "resolve_device", None) is own:
            module.resolve_device = resolve  # type: ignore[attr-defined]
    runner.CHECKPOINT_SECONDS = math.inf


def main(family: str) -> None:
    """Print what all cases of a family have given, or why one could not run."""
    library = open_device()
    if family == "trials":
        admit_device()
        print(json.dumps(trials(16)))
        return
    found: dict[str, Any] = {}
    families: dict[str, Callable[[], Iterator[Any]]] = {
        "small": lambda: chain(of_tasks(), of_kinds(), of_inverses(), of_signals()),
        "large": lambda: of_tasks(large=True),
    }
    for name, make, config in families[family]():
        try:
            found[name] = compare(make, config)
        except Exception as error:  # noqa: BLE001  (the test says which may fail)
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    if family == "small":
        found |= {f"packed {name}": packed(name) for name in PACKED}
    print(json.dumps(found))
    del library


if __name__ == "__main__":
    main(sys.argv[1])
