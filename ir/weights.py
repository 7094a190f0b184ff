"""Named weights, loaded one at a time: the data side of a module, which itself only names them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from stemma.ir.errors import CheckpointError
from stemma.ir.types import Tensor


class WeightStore:
    """Maps a weight's name to its type and a loader; nothing is kept in memory between loads.

    Calling the store with a name returns the value: a float array (bf16 widened to float32), an integer array, or `Quantized`.
    So a store serves as the `weights` argument of the interpreter. Passes that compute new weights `add` them under new names.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Tensor, Callable[[], Any]]] = {}
        self._raw: dict[str, Callable[[], Any]] = {}

    def add(self, name: str, type: Tensor, load: Callable[[], Any], raw: Callable[[], Any] | None = None) -> None:
        """Register a weight; CheckpointError when the name is taken.

        `raw` gives the elements as they are stored (bf16 as uint16 bits, a quantized type as `Quantized`): something with a `shape`
        of which `raw[start:stop]` reads rows, or None.
        """
        if name in self._entries:
            raise CheckpointError(f"Two weights are called {name!r}.")
        self._entries[name] = (type, load)
        if raw is not None:
            self._raw[name] = raw

    def include(self, other: WeightStore, prefix: str = "") -> None:
        """Add every weight of another store under `prefix` and its name."""
        for name, (type, load) in other._entries.items():
            self.add(prefix + name, type, load, other._raw.get(name))

    def raw(self, name: str) -> Any:
        """The stored elements (see `add`), or None when the weight has no raw form."""
        return self._raw[name]() if name in self._raw else None

    def __call__(self, name: str) -> Any:
        if name not in self._entries:
            raise CheckpointError(f"The module reads the weight {name!r}, which the checkpoint does not have.")
        type, load = self._entries[name]
        value = load()
        if tuple(value.shape) != type.shape:
            raise CheckpointError(f"The weight {name!r} has the shape {tuple(value.shape)} instead of {type.shape}.")
        return value

    def type(self, name: str) -> Tensor:
        """The declared type of a weight."""
        return self._entries[name][0]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
