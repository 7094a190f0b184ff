"""Every code block of the README and of docs/ runs: ```python in one namespace per page, ```bash line by line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scratch folder that looks like the repository to the examples: they write into build/ only."""
    scratch = tmp_path_factory.mktemp("docs")
    (scratch / "build").mkdir()
    for name in ("examples", "docs", "tests", "Makefile", "pyproject.toml"):
        (scratch / name).symlink_to(ROOT / name)
    return scratch


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_blocks_run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    namespace: dict[str, object] = {"__name__": "__main__"}
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert {language for language, _ in blocks} <= {"python", "bash", "sh", "text", "console"}, (
        "a block of a language that nothing runs"
    )
    for language, code in blocks:
        if language == "python":
            exec(compile(code, f"{page.name}", "exec", dont_inherit=True), namespace)
        elif language == "bash":
            for line in filter(None, code.splitlines()):
                done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=600)
                assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        elif language == "sh":  # make targets would run this suite: only that they exist is checked
            for line in filter(None, code.splitlines()):
                command = line.split("#")[0].split()
                assert command[0] == "make", f"{line}: a sh block holds make targets only"
                subprocess.run(["make", "--dry-run", "-C", str(ROOT), *command[1:]], check=True, capture_output=True)


@pytest.mark.quick
def test_links_lead_somewhere() -> None:
    """Every relative link of a page names a file that exists."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.quick
def test_the_readme_shows_the_example_as_it_is() -> None:
    """The pass that the README walks through is the file in examples/, word for word."""
    source = (ROOT / "examples" / "passes" / "fast_gelu.py").read_text(encoding="utf-8")
    assert source[source.index("from __future__") :].strip() in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("example", "start", "page"),
    [("programs/mirostat.py", "@p.program", "programs.md"), ("drafters/last_follower.py", "@dataclass", "drafters.md")],
)
def test_pages_show_their_examples_as_they_are(example: str, start: str, page: str) -> None:
    source = (ROOT / "examples" / example).read_text(encoding="utf-8")
    assert source[source.index(start) :].strip() in (ROOT / "docs" / page).read_text(encoding="utf-8")
