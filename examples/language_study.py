"""A character LSTM whose dropout rates are tuned while it trains, beside rates left as they are.

    python examples/language_study.py --data-root DIR          # about a quarter of an hour
    python examples/language_study.py --embedded --seeds 1 --outer-steps 3

After Lorraine, Vicol, Duvenaud 2020, section 5.4. Every arm takes the same inner steps from the
same initial weights: no dropout; all rates frozen where they start; and for each task its rates
tuned on the validation split, and a retraining from scratch with the rates found.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

import ift_tune
from ift_tune.base.environment import environment
from ift_tune.studies.writing import Finding, Study, Verdict, tallied, write_study
from ift_tune.trial.tables import RunDirectory

NO_DROPOUT, FROZEN = "no dropout", "frozen"
OFF = 1e-6  # a rate that drops nothing in all the steps of a run


def train(
    task: ift_tune.tasks.Task, seed: int, steps: int, every: int, *, arm: str, state: Any = None
) -> tuple[list[dict[str, Any]], Any]:
    """Run one arm; return its course, a row every so many steps, and the state of its rates."""
    problem: Any = task.make_problem(task.default_config, "cpu", seed)
    if arm == NO_DROPOUT:
        problem.hyper.set_coarse(dict.fromkeys(problem.hyper.coarse_space(), OFF))
    if state is not None:
        problem.hyper.load_state_dict(state)
    joint = ift_tune.JointOptimizer(problem, task.default_config, seed=seed)
    step = joint.step if arm == f"{task.name} tuned" else joint.baseline_step
    rows, seconds = [], 0.0
    for number in range(1, steps + 1):
        start = time.process_time()
        step()
        seconds += time.process_time() - start
        if number % every == 0 or number == steps:
            found: dict[str, Any] = {"arm": arm, "seed": seed, "step": number}
            for split in ("train", "val", "search", "test"):
                found |= joint.evaluate(split)
            found |= {f"rate {name}": rate for name, rate in problem.summary().items()}
            rows.append(found | {"cpu_seconds": seconds})
    return rows, problem.hyper.state_dict()


def run(tasks: list[ift_tune.tasks.Task], seeds: int, steps: int, every: int) -> pd.DataFrame:
    """Return the courses of all arms and seeds.

    The two controls do not depend on how many rates there are: masks of equal rates are drawn
    alike. So they are run with the first task only.
    """
    courses: list[dict[str, Any]] = []

    def keep(rows: list[dict[str, Any]]) -> None:
        courses.extend(rows)
        last = rows[-1]
        print(
            f"seed {last['seed']}, {last['arm']}: val loss {last['val_loss']:.3f}, test loss "
            f"{last['test_loss']:.3f}, {last['cpu_seconds']:.0f} s",
            flush=True,
        )

    for seed in range(seeds):
        for arm in (NO_DROPOUT, FROZEN):
            keep(train(tasks[0], seed, steps, every, arm=arm)[0])
        for task in tasks:
            rows, state = train(task, seed, steps, every, arm=f"{task.name} tuned")
            keep(rows)
            keep(train(task, seed, steps, every, arm=f"{task.name} retrained", state=state)[0])
    return pd.DataFrame(courses)


def summarise(courses: pd.DataFrame) -> pd.DataFrame:
    """Return a row an arm and seed: its end, and its test loss where the search loss was least."""
    runs = courses.groupby(["arm", "seed"], sort=False)
    ends = runs.last().drop(columns=[c for c in map(str, courses) if c.startswith("rate ")])
    best = courses.loc[runs["search_loss"].idxmin()].set_index(["arm", "seed"])
    ends["stopped_step"], ends["stopped_test_loss"] = best["step"], best["test_loss"]
    return ends.reset_index()


def judge(finals: pd.DataFrame, tasks: list[ift_tune.tasks.Task]) -> Iterator[Finding]:
    """Compare every tuned arm with the frozen rates, seed by seed."""

    def values(arm: str, column: str) -> Any:
        return finals.loc[finals["arm"] == arm, column].to_numpy()  # in the order of the seeds

    measures = {
        "val_loss": ("tuned", "validation loss at the end"),
        "test_loss": ("tuned", "test loss at the end"),
        "retrained_test_loss": ("retrained", "test loss after retraining with the rates found"),
        "stopped_test_loss": ("tuned", "test loss with early stopping on the search split"),
    }
    for task in tasks:
        for claim, (arm, what) in measures.items():
            column = claim.removeprefix("retrained_")
            mine, theirs = values(f"{task.name} {arm}", column), values(FROZEN, column)
            yield Finding(
                f"{task.name}.{claim}",
                tallied(int((mine < theirs).sum()), len(mine)),
                f"{task.name}: tuning lowers the {what}: {mine.mean():.3f} against "
                f"{theirs.mean():.3f} nats per character, lower in {(mine < theirs).sum()} of "
                f"{len(mine)} seeds",
            )
        price = values(f"{task.name} tuned", "cpu_seconds").mean()
        price /= values(FROZEN, "cpu_seconds").mean()
        yield Finding(
            f"{task.name}.price",
            Verdict.NOTE,
            f"{task.name}: tuning takes {price:.1f} times the processor time of plain training at "
            "equal inner steps.",
        )


def as_markdown(finals: pd.DataFrame) -> str:
    """Return the means over seeds, an arm a line."""
    columns = ["train_loss", "val_loss", "test_loss", "test_error", "stopped_test_loss"]
    means = finals.groupby("arm", sort=False)[columns].mean()
    lines = [f"| arm | {' | '.join(c.replace('_', ' ') for c in columns)} |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for arm, row in means.iterrows():
        lines.append(f"| {arm} | " + " | ".join(f"{value:.3f}" for value in row) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run all arms, print them, and write the tables and README.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", nargs="+", default=["text-dropout", "text-dropout-many"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--outer-steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=5, help="outer steps between evaluations")
    parser.add_argument("--data-root")
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/language"))
    options = parser.parse_args()

    tasks = [
        ift_tune.tasks.get(name, data_root=options.data_root, embedded=options.embedded)
        for name in options.tasks
    ]
    steps: int = options.outer_steps
    settings = {"task": "+".join(options.tasks), "seeds": options.seeds, "outer_steps": steps}
    configs = {task.name: task.default_config.to_flat() for task in tasks}
    directory = RunDirectory(options.out)  # one that is not empty is refused before the work
    courses = run(tasks, options.seeds, steps, options.every).round(6)
    directory.begin(settings | {"configs": configs}, environment())
    finals = summarise(courses)
    rates = " and ".join(f"{task.name} ({task.sizes.hypers:,} rates)" for task in tasks)
    about = (
        f"A character LSTM with learned dropout: {rates}. Every arm takes {steps} times "
        f"{tasks[0].default_config.inner_steps} inner steps; {options.seeds} seeds, each with its "
        "own initial weights and stretch of text. Losses are nats per character, measured "
        f"without dropout. `{FROZEN}` leaves all rates where the tuned arms start (so its "
        "retraining is itself), `retrained` trains from scratch with the rates found, and "
        "`stopped` is the moment of the least search loss.\n\n" + as_markdown(finals)
    )
    study = Study(
        "Learned dropout in a character LSTM",
        about,
        {"finals": finals, "courses": courses},
        list(judge(finals, tasks)),
    )
    for file in write_study(directory.path, study):
        print(file)


if __name__ == "__main__":
    main()
