"""Text to token ids and back, piece by piece, and chat templates. `tokenizers` and `jinja2` are imported when first used."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stemma.runtime.errors import ArtifactError, InputError, StemmaRuntimeError

_INCOMPLETE = "\ufffd"
_CONTEXT_TOKENS = 6  # tokens before a piece that can change how it reads (spaces, bytes of one character)


class Tokenizer:
    """The tokenizer of an artifact: `read(name)` gives its members, `has(name)` tells which there are."""

    def __init__(self, read: Callable[[str], bytes], has: Callable[[str], bool], source: str) -> None:
        if not has("tokenizer.json"):
            raise ArtifactError(
                f"{source} has no tokenizer. Use token ids (forward, generate_ids), or compile from a folder with tokenizer.json."
            )
        try:
            from tokenizers import Tokenizer as Native
        except ImportError:
            raise StemmaRuntimeError("Text needs the package 'tokenizers'. Install it, or use token ids.") from None
        try:
            self._native = Native.from_str(read("tokenizer.json").decode())
        except ArtifactError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise ArtifactError(
                f"The tokenizer.json of {source} cannot be read by the installed tokenizers package ({error})."
                " Update that package, or compile the model again."
            ) from None
        self._native.no_padding()
        self._native.no_truncation()
        self.config: dict[str, Any] = json.loads(read("tokenizer_config.json")) if has("tokenizer_config.json") else {}
        self._chat = read("chat_template.jinja").decode() if has("chat_template.jinja") else self._template_of_config()
        self._source = source

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`; with `special`, those that the tokenizer adds around a text (such as its first token)."""
        try:
            text.encode()
        except UnicodeEncodeError:  # Python holds bytes that are no UTF-8 as lone surrogates
            raise InputError("The prompt is not valid Unicode text: it has bytes of another encoding. Give UTF-8.") from None
        ids: list[int] = self._native.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        text: str = self._native.decode(list(ids), skip_special_tokens=True)
        return text

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be used."""
        return self._chat is not None

    def chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt for a conversation, by the model's own template; encode it with `special=False`.

        Messages are {"role": ..., "content": ...}. `variables` reach the template (`add_generation_prompt`, by default True,
        `tools`, ...). It runs in Jinja2's sandbox. InputError when it rejects the messages.
        """
        if self._chat is None:
            raise InputError(f"The tokenizer of {self._source} has no chat template. Write the prompt as plain text.")
        try:
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise StemmaRuntimeError("Chat templates need the package 'jinja2'. Install it, or write plain prompts.") from None
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _reject, "strftime_now": _now}
        tokens = {k: _content(v) for k, v in self.config.items() if k.endswith("_token") and v is not None}
        try:
            return environment.from_string(self._chat).render(
                **{"messages": messages, "add_generation_prompt": True, **tokens, **variables}
            )
        except Exception as error:  # whatever the template's expressions raise
            raise InputError(f"The chat template of {self._source} rejects these messages: {str(error).rstrip('.')}.") from None

    def _template_of_config(self) -> str | None:
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several named templates
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        return template


class TextStream:
    """Turns tokens into pieces of text as they come; the pieces together are the text that continues the prompt.

    A piece is held back while its last character is incomplete. The new text is the difference of two decodings with the same
    start (as in vLLM's incremental detokenizer), so that decoders which look at the previous token see it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT_TOKENS:])
        self._read = len(self._ids)
        self._known = tokenizer.decode(self._ids)

    def push(self, token: int) -> str:
        """The text that this token completes, perhaps none."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if len(text) <= len(self._known) or text.endswith(_INCOMPLETE):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """What is still held back, incomplete characters as U+FFFD."""
        return self._advance(self._tokenizer.decode(self._ids))

    def _advance(self, text: str) -> str:
        piece = text[len(self._known) :]
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        self._known = self._tokenizer.decode(self._ids)
        return piece


class StopStrings:
    """Cuts a stream of text before the first stop string, also when that spans several pieces."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """What may be shown now: no stop string can begin in it."""
        if self.found:
            return ""
        text = self._held + piece
        starts = [start for start in map(text.find, self._strings) if start >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        keep = max((_overlap(text, stop) for stop in self._strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back because it could have begun a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # Jinja2's own filter escapes characters of HTML, which prompts must not contain.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _reject(message: str) -> str:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
