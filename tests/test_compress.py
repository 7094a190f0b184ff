"""Choice of formats under a budget: the greedy against every choice, budgets met, bad budgets refused."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemma.ir import PassError, dtype, parse_module, print_module, verify
from stemma.passes.base import PassContext
from stemma.passes.compress import Compress, Option, _Trial, find_units, greedy, hull
from stemma.passes.measure import Meter
from tests.programs import tiny_lm
from tests.test_quantize import store


def context(tokens: int = 48) -> PassContext:
    _, weights = tiny_lm()
    return PassContext(weights=store(weights), calibration=(np.random.default_rng(1).integers(0, 50, tokens),))


FORMATS = "int8+int4_g32+int2_g32"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=4), min_size=1, max_size=4))
def test_greedy_states_are_the_best_of_their_size(units: list[list[tuple[int, int]]]) -> None:
    """Whatever else fits in the bytes of a state of the greedy has no smaller divergence, once sizes shrink from the start."""
    options = [[Option("", 50, 0.0), *(Option(f"f{i}", b, float(d)) for i, (b, d) in enumerate(u))] for u in units]
    states = greedy([o[0] for o in options], options)
    for state in states:
        size, cost = sum(o.bytes for o in state), sum(o.divergence for o in state)
        assert cost <= min(sum(o.divergence for o in c) for c in product(*options) if sum(o.bytes for o in c) <= size) + 1e-9
    assert sum(o.bytes for o in states[-1]) == sum(min(o.bytes for o in u) for u in options)


def test_hull_is_convex() -> None:
    options = [Option("", 100, 0.0), Option("a", 50, 1.0), Option("b", 40, 9.0), Option("c", 25, 2.0), Option("d", 60, 5.0)]
    assert [o.format for o in hull(options)] == ["", "a", "c"]


def test_budgets_are_met() -> None:
    """Mean bits, megabytes, speed: what is stored fits. Divergence: what is measured on the result stays below."""
    module, _ = tiny_lm()
    full = sum(u.elements for u in find_units(module["forward"]))
    losses = []
    for bits in (16.0, 8.5, 4.8):
        made = context()
        changed = Compress(budget=f"{bits}bits", formats=FORMATS).run(module, made)
        verify(changed)
        assert parse_module(print_module(changed)) is changed
        assert sum(row["bytes"] for row in made.choices) <= bits * full / 8
        losses.append(Meter(module, made.weights, made.calibration)(changed).kl)
    assert losses[0] is not None and 0 < losses[0] < losses[1] < losses[2]  # type: ignore[operator]
    for budget in (f"{full / 1e6 * 0.7:.6f}MB", f"{30e9 / full / 0.7:.3f}tok/s"):
        made = context()
        Compress(budget=budget, formats=FORMATS).run(module, made)
        assert sum(row["bytes"] for row in made.choices) <= full * 0.7 * 1.001
    sizes = []
    for limit in (1e-5, 1e-3, 1e-1):
        made = context()
        changed = Compress(budget=f"kl={limit}", formats=FORMATS, tokens=48).run(module, made)
        found = Meter(module, made.weights, made.calibration)(changed).kl
        assert found is not None and found <= limit * 1.01
        sizes.append(sum(row["bytes"] for row in made.choices))
    assert sizes[0] > sizes[1] > sizes[2]


def test_what_shares_an_input_or_a_table_shares_a_format() -> None:
    """q, k and v stay joinable; a tied embedding stays tied."""
    module, _ = tiny_lm()
    changed = Compress(budget="5bits", formats=FORMATS).run(module, context())
    by_input: dict[object, set[str]] = {}
    for node in changed["forward"].nodes:
        if node.op.name == "linear":
            by_input.setdefault(node.inputs[0], set()).add(node.inputs[1].dtype)
    assert all(len(names) == 1 for names in by_input.values())
    embedded = next(n.inputs[0] for n in changed["forward"].nodes if n.op.name == "embedding")
    assert changed["forward"].results[0].inputs[1] is embedded and dtype(embedded.dtype).kind == "quantized"


def test_clear_errors() -> None:
    module, _ = tiny_lm()
    with pytest.raises(PassError, match="none of 4.5bits"):
        Compress(budget="small").run(module, context())
    with pytest.raises(PassError, match="smallest choice"):
        Compress(budget="1bits", formats=FORMATS).run(module, context())
    with pytest.raises(PassError, match="calibration"):
        Compress(formats=FORMATS).run(module, PassContext(weights=context().weights))
    twice = Compress(budget="4.9bits", formats=FORMATS).run(module, context())
    quantized = all(dtype(n.inputs[1].dtype).kind == "quantized" for n in twice["forward"].nodes if n.op.name == "linear")
    assert quantized
    with pytest.raises(PassError, match="no float weights"):
        Compress(formats=FORMATS).run(twice, context())


def test_options_are_refused_before_anything_is_measured() -> None:
    for options, message in (
        (Compress(budget="1.2.3bits"), "none of 4.5bits"),
        (Compress(budget=".bits"), "none of 4.5bits"),
        (Compress(formats="int8+int9"), "formats=int8\\+int9 has 'int9', which is not available"),
        (Compress(tokens=-5), "tokens=-5 .* two tokens at least"),
        (Compress(budget="50tok/s", bandwidth=0.0), "bandwidth=0.0"),
        (Compress(budget="50tok/s", bandwidth=float("nan")), "bandwidth=nan"),
    ):
        with pytest.raises(PassError, match=message):
            options.validate()


def test_a_format_that_breaks_the_model_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are NaN have no divergence at all, which is not a divergence of 0."""
    module, _ = tiny_lm()
    plain = _Trial.divergence
    monkeypatch.setattr(_Trial, "divergence", lambda self, formats: nan_for_int2(plain(self, formats), formats.values()))
    made = context()
    Compress(budget="8.6bits", formats=FORMATS).run(module, made)
    assert {row["format"] for row in made.choices} <= {"f32", "int8", "int4_g32"}


def nan_for_int2(divergence: float, formats: Iterable[str]) -> float:
    return np.inf if "int2_g32" in formats else divergence


def test_logits_without_a_divergence() -> None:
    """Of a trial whose changed model makes NaN; and a reference that is NaN itself is refused."""
    module, _ = tiny_lm()
    made = context()
    trial = _Trial(module["forward"], made, 16)
    unit = next(iter(find_units(module["forward"])))
    run, values, reference = trial.runs[0]
    trial.runs = [(run, values, np.full_like(reference, np.nan))]
    assert trial.divergence({unit: "int8"}) == np.inf
