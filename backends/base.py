"""What a backend is: the kernels it claims by hand-written templates, its limits, its toolchain and its device.

Code generation asks a backend about one kernel at a time, as a *body*: a Function whose parameters are the kernel's inputs and
whose results are its outputs. The answer is a `Claim` (a template instantiation and how to call it) or a `Refusal` with a reason;
what is refused is generated from the body, or decomposed until it can be.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from stemma.backends.dialect import Dialect
from stemma.ir import Array, CompileError, Function, Module, Node, SizeLike, Tensor


@dataclass(frozen=True)
class Limits:
    """Declared bounds of a device; None means that the device has no such bound.

    vector_bytes: widest vector register. buffers: buffers one kernel may bind. shared_bytes: fast memory shared by a work group.
    grid: largest number of work groups along one axis.
    """

    vector_bytes: int
    buffers: int | None = None
    shared_bytes: int | None = None
    grid: int | None = None


@dataclass(frozen=True)
class Kernel:
    """One compiled routine: a template and its options. Equal kernels are rendered once. `name` is its identifier in the source."""

    name: str
    template: str
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel call: input or output number `value`, a size, an array of sizes, or scratch of `value` bytes."""

    kind: Literal["input", "output", "size", "sizes", "scratch"]
    value: Any


@dataclass(frozen=True)
class Claim:
    """A backend's offer to run a body as one kernel.

    arguments: the call, in order. layouts: for inputs that must be packed weights, the name of the layout by input number.
    inplace: pairs (output, input) that must be one buffer. output_bytes: sizes of outputs whose layout is not the plain one.
    what: a few words for listings ("bf16 weight, 2 more ops").
    """

    kernel: Kernel
    arguments: tuple[Argument, ...]
    layouts: Mapping[int, str] = field(default_factory=dict)
    inplace: tuple[tuple[int, int], ...] = ()
    output_bytes: Mapping[int, SizeLike] = field(default_factory=dict)
    what: str = ""


@dataclass(frozen=True)
class Refusal:
    """Why a body is not claimed, in words for `stemma why` and error messages."""

    reason: str


@dataclass(frozen=True)
class Inputs:
    """What is known of a body's inputs: numbers of those that are constant expressions, and their offered layouts."""

    constant: frozenset[int] = frozenset()
    panels: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Built:
    """A built library: its path, the instruction-set variants inside, best first, and the seconds the tools ran."""

    path: Path
    variants: tuple[str, ...]
    seconds: float
    cached: bool


class Toolchain(Protocol):
    """Turns source text into a library."""

    def build(self, source: str, variants: Sequence[str] | None, output: Path) -> Built:
        """Compile for these instruction sets (None: all) and link; CompileError with the compiler's own first lines on failure."""
        ...

    def describe(self) -> str:
        """The tools found and what this machine can run, for `stemma targets`; CompileError when there are none."""
        ...


class Executable(Protocol):
    """A module made ready to run by one backend."""

    def call(self, function: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one function; inputs and results by name."""
        ...


class Backend(ABC):
    """One target. Stateless; the instance in the registry is shared."""

    name: str
    limits: Limits
    dtypes: frozenset[str]
    """Element types a buffer may have."""
    hot: frozenset[str] = frozenset()
    """Operations that are worth a template: a region around one is opened rather than generated as a whole."""
    dialect: Dialect
    """The language of generated kernels."""

    @abstractmethod
    def claim(self, body: Function, inputs: Inputs) -> Claim | Refusal:
        """The kernel that runs `body`, or why there is none."""

    def legalize(self, node: Node) -> Node | None:
        """The same value in a form that this backend claims, before it is asked; None when there is nothing to change."""
        return None

    @abstractmethod
    def render(self, kernel: Kernel) -> str:
        """The source text of one claimed kernel."""

    @abstractmethod
    def host(self, *, title: str, kernels: Sequence[str], functions: Sequence[Mapping[str, Any]]) -> str:
        """The whole source of a module: support code, kernels, and the launch lists of its functions (see `codegen.emit`)."""

    def layout_bytes(self, layout: str, tensor: Tensor) -> int:
        """Bytes of a packed weight in a layout of this backend; CompileError for a layout it does not have."""
        raise CompileError(f"The backend {self.name} has no weight layout {layout!r}.")

    @property
    def toolchain(self) -> Toolchain | None:
        """The compiler driver, None when the backend needs none."""
        return None

    @property
    def device(self) -> str | None:
        """The module of the runtime half (importable without the compiler), None when it runs nothing."""
        return None

    def executable(self, module: Module, weights: Any) -> Executable | None:
        """The module, ready to run without compiling anything; None when the backend needs code generation for that."""
        return None
