"""The page of the command line: its configuration file does what the page says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from command_line import Call

from ift_tune import load_results

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"


def test_the_file_of_the_page_is_searched_with(call: Call) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (line,) = re.findall(r"^ift-tune search .*$", PAGE.read_text(), flags=re.MULTILINE)
    assert "outer-steps: 20 " not in text
    assert "outer-steps: 20" in text
    Path("cleaning.yaml").write_text(text.replace("outer-steps: 20", "outer-steps: 2"))
    assert call(*shlex.split(line)[1:], "--quiet").status == 0
    trials = load_results("runs/cleaning").trials
    assert len(trials) == 3
    assert set(trials["terms"]) == {2}
    assert set(trials["meta_lr"]) == {0.01}
    assert trials["inner_steps"].between(5, 20).all()
    again = ["search", "--config", "runs/cleaning/run.json", "--out", "runs/again", "--quiet"]
    assert call(*again).status == 0
    assert load_results("runs/again").trials["search_error"].tolist() == (
        trials["search_error"].tolist()
    )
