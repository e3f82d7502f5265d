"""Pictures of what a run has learned: from a real run to files and into the page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from ift_tune import Budget, ClassificationProblem, MetaConfig, WeightDecay, tasks
from ift_tune.base.views import HeatMap, Histogram, ImageGrid, View, unpack
from ift_tune.report import draw_pictures
from ift_tune.report.runs import compose
from ift_tune.trial.session import run_single
from ift_tune.trial.tables import VIEWS, load_results, load_views

GRID = ImageGrid(
    "two & <pixels>", torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1), captions=("a", "b")
)
VIEWS_SHOWN: list[View] = [
    GRID,
    HeatMap("map", torch.rand(3, 4) + 0.1, log=True),
    HeatMap("constant", torch.ones(1, 4), log=True),
    Histogram("weights", {"clean": torch.rand(50), "corrupted": torch.rand(50) + 1}, log=True),
    Histogram("one value", {"all": torch.zeros(3)}),
]


class Pictured(ClassificationProblem):
    """A problem with a picture of its own."""

    def views(self) -> list[View]:
        return [GRID]


def make_problem(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
    task = tasks.get("digits-weight-decay")
    found = task.make_problem(config, device, seed)
    assert isinstance(found.hyper, WeightDecay)
    return Pictured(found.model, found.hyper, found.splits)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pictures") / "run"
    run_single(make_problem, Budget(outer_steps=1), out=out, config=MetaConfig(inner_steps=1))
    return out


@pytest.mark.parametrize("view", VIEWS_SHOWN, ids=lambda view: view.title)
def test_every_view_is_drawn(view: View, tmp_path: Path) -> None:
    compose([view]).savefig(tmp_path / "view.png")
    shades = imread(tmp_path / "view.png").reshape(-1, 4)
    assert len({tuple(shade) for shade in shades.tolist()}) > 10


def test_low_is_black_and_high_is_white(tmp_path: Path) -> None:
    figure = compose([GRID])
    shown = [axes.images[0].get_array() for axes in figure.subfigs[0].axes if axes.images]
    assert [float(image.mean()) for image in shown if image is not None] == [0.0, 1.0]


def test_a_run_leaves_its_pictures_and_they_are_drawn(finished: Path) -> None:
    ((name, (view,)),) = load_views(finished).items()
    assert (name, view.title) == ("trial-00000", GRID.title)
    (picture,) = draw_pictures(finished)
    assert picture == finished / "pictures" / "trial-00000-two-pixels.png"
    assert picture.with_suffix(".svg").exists()


def test_the_tables_alone_hold_them_too(finished: Path, tmp_path: Path) -> None:
    for name in ("trials.parquet", "steps.parquet"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    (view,) = unpack(load_results(tmp_path).trials.attrs[VIEWS])
    assert view.title == GRID.title
    assert len(draw_pictures(tmp_path)) == 1


def test_a_run_without_pictures_has_none(tmp_path: Path) -> None:
    def plain(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
        problem = make_problem(config, device, seed)
        problem.views = list  # type: ignore[method-assign]
        return problem

    run_single(plain, Budget(outer_steps=1), out=tmp_path / "run", config=MetaConfig(inner_steps=1))
    assert load_views(tmp_path / "run") == {}
    assert draw_pictures(tmp_path / "run") == []
    assert not (tmp_path / "run" / "pictures").exists()
