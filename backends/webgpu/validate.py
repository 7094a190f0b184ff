"""Validation of WGSL with Tint, the shader compiler of Chromium, through the npm package `webgpu`. No GPU is needed.

Install it once: `npm install --prefix .venv webgpu@0.6.2`, or anywhere, and name its node_modules in STEMMA_NODE_MODULES.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from stemma.ir import CompileError

WEBGPU_VERSION = "0.6.2"


def unavailable() -> str:
    """Why shaders cannot be validated here; "" when they can."""
    if shutil.which("node") is None:
        return "node is not on PATH"
    if not (_modules() / "webgpu" / "package.json").is_file():
        return f"the npm package webgpu@{WEBGPU_VERSION} is not in {_modules()}"
    return ""


def _modules() -> Path:
    default = Path(__file__).resolve().parent.parent.parent / ".venv" / "node_modules"
    return Path(os.environ.get("STEMMA_NODE_MODULES") or default)


def validate(shaders: Mapping[str, str]) -> dict[str, str]:
    """Compile shaders (entry point -> WGSL text); returns entry point -> error for each that is rejected.

    CompileError when the validator cannot run at all.
    """
    if reason := unavailable():
        raise CompileError(f"WGSL cannot be validated: {reason}.")
    script = Path(__file__).with_name("validate.mjs")
    request = json.dumps({"shaders": [{"name": n, "code": code, "entry": n} for n, code in shaders.items()]})
    done = subprocess.run(
        ["node", str(script), str(_modules().parent)], input=request, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    if done.returncode:
        raise CompileError(f"The WGSL validator failed: {done.stderr.strip()[-500:]}")
    return {item["name"]: item["error"] for item in json.loads(done.stdout)}
