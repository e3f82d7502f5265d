"""What an audit of a fit needs, kept until it is asked for: it travels with the estimator."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

from ift_tune.sklearn.recipe import Recipe
from ift_tune.sklearn.runs import Home


class AwaitedAudit:
    """The run of a fit and what it was made of.

    Pickled, it is the files of the run and the rows of the fit; the run is there again, in a
    temporary folder, when it is asked for.

    Attributes:
        recipe: Makes the problem.
    """

    def __init__(self, home: Home, recipe: Recipe) -> None:
        """Take the run's folder, which goes when nobody refers to it any more."""
        self.recipe = recipe
        self._home: Home | None = home
        self._files = b""

    @property
    def home(self) -> Home:
        """The run's folder."""
        if self._home is None:
            self._home, self._files = _unpacked(self._files), b""
        return self._home

    @property
    def size(self) -> int:
        """How many bytes would travel, at most."""
        files = len(self._files)
        if self._home is not None:
            files = sum(file.stat().st_size for file in _files(self._home.path))
        splits = (self.recipe.train, self.recipe.val, self.recipe.search)
        return files + sum(part.inputs.nbytes + part.targets.nbytes for part in splits)

    def __getstate__(self) -> dict[str, Any]:
        """Return the rows, and the files as one."""
        files = self._files if self._home is None else _packed(self._home.path)
        return {"recipe": self.recipe, "_home": None, "_files": files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take them; nothing is written yet."""
        vars(self).update(state)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _packed(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in _files(folder):
            archive.write(path, path.relative_to(folder))
    return buffer.getvalue()


def _unpacked(files: bytes) -> Home:
    home = Home(None)
    home.path.mkdir()
    with zipfile.ZipFile(io.BytesIO(files)) as archive:
        archive.extractall(home.path)
    return home
