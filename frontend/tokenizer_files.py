"""The files of a checkpoint's tokenizer: which there are, and whether the runtime will be able to use them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stemma.ir import CheckpointError

NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The files of the tokenizer in a folder; CheckpointError when there is none."""
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"There is no tokenizer in {folder}: {folder / 'tokenizer.json'} does not exist. Name its folder.")
    return tuple(folder / name for name in NAMES if (folder / name).exists())


def check_tokenizer(files: Sequence[Path]) -> None:
    """CheckpointError when a file of a tokenizer cannot be read: said when compiling, not when the artifact is first used."""
    found = {file.name: file for file in files}
    path = found.get("tokenizer.json")
    if path is not None:
        from tokenizers import Tokenizer

        try:
            Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(
                f"{path} cannot be read as a tokenizer ({_short(error)}). Copy or download it again, or update tokenizers."
            ) from None
    if "tokenizer_config.json" in found:
        path = found["tokenizer_config.json"]
        settings = read_object(path)
        template = settings.get("chat_template")
        named = isinstance(template, list) and all(isinstance(t, dict) and isinstance(t.get("template"), str) for t in template)
        if not (template is None or isinstance(template, str) or named):
            raise CheckpointError(f"The chat_template in {path} is neither text nor a list of named texts. Correct or remove it.")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {_short(error)}. Copy or download it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object. Copy or download it again.")
    return value


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
