"""The layout: which folder may import which, and how light the runtime is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick
ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "ir": {"ir"},
    "passes": {"ir", "passes"},
    "frontend": {"ir", "frontend"},
    "codegen": {"ir", "passes", "backends", "codegen"},
    "backends": {"ir", "codegen", "backends"},
    "runtime": {"runtime"},
}
HEAVY = {
    "torch",
    "transformers",
    "jinja2",
    "typer",
    "rich",
    "tokenizers",
    "stemma.ir",
    "stemma.passes",
    "stemma.codegen",
    "stemma.frontend",
}


def imports(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_imports_go_one_way(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "stemma" or len(parts) < 2:
                continue
            device = folder == "runtime" and parts[1] == "backends" and (len(parts) < 4 or parts[3] == "device")
            errors = path.name == "device.py" and parts[1:3] == ["runtime", "errors"]
            assert parts[1] in MAY_IMPORT[folder] or device or errors, f"{path.relative_to(ROOT)} imports {name}"


def test_the_runtime_is_light() -> None:
    """Importing and asking for the loader brings in numpy and the standard library only."""
    code = f"import sys, stemma.runtime; stemma.runtime.load; print([m for m in {sorted(HEAVY)!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_files_stay_small() -> None:
    """A file that no longer fits in the head is split."""
    long = {}
    for folder in (*MAY_IMPORT, "stemma/cli"):
        for path in (ROOT / folder).rglob("*.py"):
            count = len(path.read_text(encoding="utf-8").splitlines())
            if count > 500:
                long[str(path.relative_to(ROOT))] = count
    assert not long
