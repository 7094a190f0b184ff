"""Fixtures that several files share: checkpoints and artifacts that are made once per session."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

logging.getLogger("torch.__trace").propagate = False  # pytest would print thousands of its lines with a failure


class Artifacts:
    """Makes checkpoints and artifacts when they are first asked for. Nobody may change the files: copy them to damage them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Path] = {}

    def checkpoint(self, architecture: str, dtype: str = "f32", **settings: Any) -> Path:
        """The folder that `tests.models.make_checkpoint` writes for these arguments."""
        from tests.models import make_checkpoint

        key = repr(("checkpoint", architecture, dtype, sorted(settings.items())))
        if key not in self._made:
            # The folder's name is in the generated source, which is compiled once per content: so it is the same in every session.
            folder = self._folder / str(len(self._made)) / f"{architecture}-{dtype}"
            self._made[key] = make_checkpoint(architecture, folder, dtype, **settings)
        return self._made[key]

    def compiled(self, checkpoint: Path, **options: Any) -> Path:
        """The artifact of a checkpoint; `options` are those of `stemma.compiler.compile`, one instruction set by default."""
        from stemma.compiler import compile

        options = {"variants": ("native",), **options}
        key = repr(("artifact", str(checkpoint), sorted(options.items())))
        if key not in self._made:
            output = self._folder / f"{len(self._made)}.stemma"
            compile(checkpoint, output, **options)
            self._made[key] = output
        return self._made[key]


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Artifacts]:
    """The session's checkpoints and artifacts."""
    yield Artifacts(tmp_path_factory.mktemp("artifacts"))
