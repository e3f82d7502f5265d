r"""Hypergradients and outer steps of this package beside plain autograd code and other libraries.

    pip install torchopt betty-ml
    git clone https://github.com/prolearner/hypertorch
    git clone https://github.com/callous-youth/BOAT        # needs `pip install higher`
    git clone https://github.com/moskomule/hypergrad
    python benchmarks/peers.py --data-root DIR --hypertorch hypertorch --boat BOAT \
        --hypergrad hypergrad --threads 1 2 --out results/peers

Four models have a decay for each of their weights. All contestants take turns in one process, so
that a change of the machine's speed meets all of them alike; before anything is timed, their
hypergradients at the same weights must be equal to 1e-4. Given are medians, and the medians of the
ratios of neighbouring timings. Whoever is not installed is left out, and said. Memory is the peak
of what tensors take in outer steps: weights, λ and the optimisers' states included, data and the
check in this package's first step not.

What each contestant is: `peer_libraries.py`. The models: `peer_models.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parent))

from peer_libraries import BARE, FROM_CHECKOUTS, OURS, PEERS, Contestant, IftTune, Plain, load
from peer_models import SETTINGS, Setting

from ift_tune.base.environment import environment, resolve_device
from ift_tune.base.files import write_atomically, write_table
from ift_tune.implicit.vectors import flatten
from ift_tune.testing.price import measured_peak, timed

HYPERGRADIENT, OUTER_STEP = "hypergradient", "outer step"
LARGEST_DIFFERENCE = 1e-4
FEWEST_REPEATS = 3
MIB = 2**20
_COLOURS = {OUTER_STEP: "#3b6fb6", HYPERGRADIENT: "#e0a458"}

Libraries = dict[type[Contestant], Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="of PyTorch, in turn")
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help=f"for each model and number of threads, {FEWEST_REPEATS} repeats in any case",
    )
    parser.add_argument("--repeats", type=int, default=50, help="at most; each times everybody")
    parser.add_argument("--inner-steps", type=int, help="T; each model has its own")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto")
    parser.add_argument("--data-root", help="where MNIST lies; embedded digits stand in for it")
    for option, contestant in FROM_CHECKOUTS.items():
        parser.add_argument(
            f"--{option}", type=Path, metavar="PATH", help=f"a checkout of {contestant.name}"
        )
    parser.add_argument("--out", type=Path, help="a folder for tables, environment and chart")
    return parser.parse_args()


def say(line: str) -> None:
    print(line, flush=True)


def find_libraries(given: argparse.Namespace) -> Libraries:
    """Return who takes part, with the library of each; who does not is printed."""
    found: Libraries = {}
    paths = {kind: getattr(given, option) for option, kind in FROM_CHECKOUTS.items()}
    for contestant in (*OURS, *PEERS, *BARE):
        if contestant in paths and paths[contestant] is None:
            option = next(o for o, kind in FROM_CHECKOUTS.items() if kind is contestant)
            say(f"left out: {contestant.name}, for want of --{option} PATH")
            continue
        try:
            found[contestant] = load(contestant, paths.get(contestant))
        except ImportError as error:
            say(f"left out: {contestant.name} ({error})")
    return found


def make(
    setting: Setting, libraries: Libraries, data_root: str | None, device: torch.device
) -> dict[str, Contestant]:
    """Return those who can take part, each with the same problem of its own."""
    found: dict[str, Contestant] = {}
    for kind, library in libraries.items():
        if kind.name.startswith("floor") and setting.name != "mnist-mlp":
            continue  # it is written for two dense layers
        found[kind.name] = kind(setting, setting.build(data_root, device), library)
    return found


def differences(contestants: dict[str, Contestant]) -> dict[str, float]:
    """Return how far each hypergradient is from this package's, relative to its norm.

    Raises:
        SystemExit: If one is too far: its time would be that of something else.
    """
    found = {name: one.hypergradient() for name, one in contestants.items()}
    vectors = {name: flatten(slopes).double() for name, slopes in found.items() if slopes}
    ours = vectors.pop(IftTune.name)
    result = {IftTune.name: 0.0}
    for name, other in vectors.items():
        result[name] = float((other - ours).norm() / ours.norm())
        angle = abs(1.0 - float(other @ ours / (other.norm() * ours.norm())))
        say(f"  {name}: relative difference {result[name]:.1e}, 1 − cosine {angle:.1e}")
        if not result[name] <= LARGEST_DIFFERENCE:
            sys.exit(f"{name} computes another hypergradient: its time would say nothing")
    return result


def peaks(
    setting: Setting, libraries: Libraries, data_root: str | None, device: torch.device
) -> dict[str, int]:
    """Return the peak of the bytes of each, over two outer steps of one inner step."""
    found = {}
    # More inner steps take no more memory, and watching tensors is slow.
    for name, one in make(replace(setting, inner_steps=1), libraries, data_root, device).items():
        problem = setting.build(data_root, device)
        held = sum(w.nbytes for w in problem.weights())
        if not isinstance(one, BARE):
            held += sum(h.nbytes for h in problem.hypers())
        one.leave_out_checks()
        # Twice, for in the second the optimisers' states are there already.
        with measured_peak(device) as peak:
            one.outer_step()
            one.outer_step()
        found[name] = held + peak.bytes
    return found


def measure(
    contestants: dict[str, Contestant], device: torch.device, *, seconds: float, repeats: int
) -> pd.DataFrame:
    """Return a row for each timing: whose, of what, in which repeat, and its seconds.

    Those of the wall, and those of this process's threads, which other processes disturb less.
    """
    actions: dict[tuple[str, str], Callable[[], object]] = {}
    for name, one in contestants.items():
        actions[name, OUTER_STEP] = one.outer_step
        if one.hypergradient() is not None:
            actions[name, HYPERGRADIENT] = one.hypergradient
    rows = []
    started = time.perf_counter()
    for repeat in range(-1, repeats):  # the first warms up
        if repeat >= FEWEST_REPEATS and time.perf_counter() - started > seconds:
            break
        for (name, what), action in actions.items():
            before = time.process_time()
            spent = timed(action, device)[1]
            cpu = time.process_time() - before
            if repeat >= 0:
                rows.append(
                    {
                        "name": name,
                        "what": what,
                        "repeat": repeat,
                        "seconds": spent,
                        "cpu_seconds": cpu,
                    }
                )
    return pd.DataFrame(rows)


def summary(times: pd.DataFrame, bytes_of: dict[str, int], far: dict[str, float]) -> pd.DataFrame:
    """Return a row for each contestant and what was timed: medians and ratios."""
    wide = times.pivot(index="repeat", columns=["what", "name"], values="seconds")
    cpu = times.pivot(index="repeat", columns=["what", "name"], values="cpu_seconds")
    plain = wide[OUTER_STEP][Plain.name]
    rows = []
    for timed_one in times[["what", "name"]].drop_duplicates().to_dict("records"):
        what, name = timed_one["what"], timed_one["name"]
        own = wide[what][name]
        to_plain = statistics.median(own / plain) if what == OUTER_STEP else float("nan")
        rows.append(
            {
                "what": what,
                "name": name,
                "seconds": statistics.median(own),
                "times_ift_tune": statistics.median(own / wide[what][IftTune.name]),
                "times_plain": to_plain,
                "cpu_seconds": statistics.median(cpu[what][name]),
                "cpu_times_ift_tune": statistics.median(cpu[what][name] / cpu[what][IftTune.name]),
                "peak_bytes": bytes_of[name],
                "difference": far.get(name, float("nan")),
                "repeats": len(own),
            }
        )
    return pd.DataFrame(rows)


def show(table: pd.DataFrame) -> None:
    for what in (OUTER_STEP, HYPERGRADIENT):
        say(
            f"  {what:30} {'seconds':>9} {'× ift_tune':>11} {'× plain':>8} "
            f"{'CPU s':>8} {'× ift_tune':>11} {'peak MiB':>9}"
        )
        part = table[table["what"] == what].sort_values("seconds")
        for row in part.to_dict("records"):
            to_plain = "" if pd.isna(row["times_plain"]) else f"{row['times_plain']:.2f}"
            say(
                f"  {row['name']:30} {row['seconds']:9.4f} {row['times_ift_tune']:11.2f} "
                f"{to_plain:>8} {row['cpu_seconds']:8.4f} {row['cpu_times_ift_tune']:11.2f} "
                f"{row['peak_bytes'] / MIB:9.1f}"
            )


def draw(table: pd.DataFrame, path: Path) -> None:
    """Draw each model's ratios to this package, at the first number of threads."""
    from ift_tune.report.drawing import best_first, drawing_style, panels, save_figure

    table = table[(table["threads"] == table["threads"].iloc[0]) & ~table["name"].isin(_own())]
    models = list(dict.fromkeys(table["model"]))
    with drawing_style():
        figure, every = panels(len(models), columns=2, width=4.4, height=2.6)
        for axes, model in zip(every, models, strict=True):
            part = table[table["model"] == model]
            outer = part[part["what"] == OUTER_STEP].sort_values("seconds")
            heights = best_first(axes, list(outer["name"]))
            for what, shift in ((OUTER_STEP, 0.2), (HYPERGRADIENT, -0.2)):
                ratios = part[part["what"] == what].set_index("name")["times_ift_tune"]
                values = ratios.reindex(outer["name"]).fillna(0.0)
                places = [height + shift for height in heights]
                axes.barh(places, values, height=0.38, color=_COLOURS[what], label=what)
            axes.axvline(1.0, color="#888888", linewidth=0.8)
            axes.set_title(SETTINGS[model].summary)
            axes.set_xlabel("time, ift_tune = 1")
        every[0].legend(frameon=False, loc="upper right")
        save_figure(figure, path)


def _own() -> list[str]:
    return [kind.name for kind in OURS]


def versions(given: argparse.Namespace, libraries: Libraries) -> dict[str, str]:
    """Return what identifies each library: its version, or its checkout's commit."""
    found = {}
    for package in ("torchopt", "betty-ml"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    for option, kind in FROM_CHECKOUTS.items():
        if kind in libraries:
            command = ["git", "-C", str(getattr(given, option)), "rev-parse", "HEAD"]
            asked = subprocess.run(command, capture_output=True, text=True, check=False)
            found[option] = asked.stdout.strip() or "unknown"
    return found


def compare(
    setting: Setting, libraries: Libraries, given: argparse.Namespace, device: torch.device
) -> tuple[list[pd.DataFrame], list[pd.DataFrame]]:
    """Measure a model at each number of threads; return timings and summaries."""
    say(f"{setting.name}: {setting.summary}; T = {setting.inner_steps}, K = {setting.terms}")
    every: list[pd.DataFrame] = []
    medians: list[pd.DataFrame] = []
    bytes_of = peaks(setting, libraries, given.data_root, device)
    for threads in given.threads:
        torch.set_num_threads(threads)
        contestants = make(setting, libraries, given.data_root, device)
        far = differences(contestants)
        times = measure(contestants, device, seconds=given.seconds, repeats=given.repeats)
        table = summary(times, bytes_of, far)
        say(f" {threads} threads, {int(table['repeats'].iloc[0])} repeats")
        show(table)
        for frame, into in ((times, every), (table, medians)):
            frame.insert(0, "model", setting.name)
            frame.insert(1, "threads", threads)
            into.append(frame)
    return every, medians


def write(
    out: Path, every: Sequence[pd.DataFrame], medians: Sequence[pd.DataFrame], where: dict[str, Any]
) -> None:
    """Write tables, environment and chart."""
    out.mkdir(parents=True, exist_ok=True)
    table = pd.concat(medians, ignore_index=True)
    write_table(out / "times", pd.concat(every, ignore_index=True))
    write_table(out / "peers", table)
    write_atomically(out / "environment.json", json.dumps(where, indent=2).encode())
    draw(table, out / "peers.png")
    say(f"written to {out}")


def main() -> None:
    given = arguments()
    warnings.filterwarnings("ignore")  # of the libraries, which are not ours to mend
    device = resolve_device(given.device)
    torch.set_num_threads(given.threads[0])
    libraries = find_libraries(given)
    every: list[pd.DataFrame] = []
    medians: list[pd.DataFrame] = []
    for name in given.models:
        setting = SETTINGS[name]
        if given.inner_steps is not None:
            setting = replace(setting, inner_steps=given.inner_steps)
        times, tables = compare(setting, libraries, given, device)
        every += times
        medians += tables
        if given.out is not None:  # after each model, for a run that is cut short
            where = environment() | {"libraries": versions(given, libraries)}
            write(given.out, every, medians, where)


if __name__ == "__main__":
    main()
