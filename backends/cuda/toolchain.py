"""CUDA C++ to PTX with nvcc; nothing is run."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from stemma.ir import CompileError

ARCHITECTURE = "sm_80"


def unavailable() -> str:
    """Why CUDA cannot be compiled here; "" when it can."""
    return "" if shutil.which("nvcc") else "nvcc is not on PATH"


def compile_ptx(source: str, architecture: str = ARCHITECTURE) -> str:
    """The PTX text of a CUDA source; CompileError with nvcc's first messages when it is rejected."""
    if reason := unavailable():
        raise CompileError(f"CUDA cannot be compiled: {reason}.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cu"
        path.write_text(source)
        command = ["nvcc", "--ptx", f"-arch={architecture}", "-std=c++17", "-w", "-o", f"{folder}/kernels.ptx", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise CompileError(f"nvcc rejected the generated CUDA source: {done.stderr.strip()[:2000]}")
        return Path(folder, "kernels.ptx").read_text()
