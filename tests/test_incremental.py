"""The incremental pass: any way of feeding rows into the step gives the logits of the plain forward."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemma.ir import Array, Function, Module, PassError, Tensor, interpret, ops, parse_module, print_module, verify
from stemma.passes.base import PassContext
from stemma.passes.fuse import Fuse, JoinLinears
from stemma.passes.incremental import Incremental
from stemma.passes.quantize import Quantize, RoundActivations
from tests.programs import BATCH, TOKENS, tiny_lm

pytestmark = pytest.mark.quick
SLOTS = 40
FREE = ("param", "weight", "constant", "reshape", "concat", "get")


def step_of(module: Module) -> Module:
    step = Incremental().run(module, PassContext())
    verify(step)
    assert parse_module(print_module(step)) is step
    return step


def feed(
    step: Function, weights: dict[str, Array], sequences: list[Array], calls: list[list[tuple[int, int]]], seed: int
) -> list[Array]:
    """Logits per sequence from calls that each list (sequence, position) rows, over randomly scattered cache slots."""
    rng = np.random.default_rng(seed)
    table = rng.permutation(SLOTS).reshape(len(sequences), -1).astype(np.int32)
    shapes = {p.attrs["name"]: tuple(SLOTS if i == 1 else int(str(n)) for i, n in enumerate(p.shape)) for p in step.params[6:]}
    state = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    logits: list[Array] = [np.zeros((len(s), 50)) for s in sequences]
    for rows in calls:
        sequence, positions = (np.array(column, np.int32) for column in zip(*rows, strict=True))
        inputs = {
            "tokens": np.array([sequences[s][p] for s, p in rows]), "positions": positions, "sequence": sequence,
            "slots": table[sequence, positions], "table": table, "selected": np.arange(len(rows)),
        }  # fmt: skip
        results = interpret(step, {**inputs, **state}, weights)
        for (s, p), row in zip(rows, results.pop("logits"), strict=True):
            logits[s][p] = row
        state = results
    return logits


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3), window=st.sampled_from([None, 1, 3]),
    softcap=st.sampled_from([None, 2.0]), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_schedule_equals_the_plain_forward(lengths: list[int], window: int | None, softcap: float | None, seed: int) -> None:
    """Prefill in chunks, one by one, several sequences of different lengths interleaved: float64 equality up to rounding."""
    if SLOTS % len(lengths):
        lengths = lengths[:2]
    module, weights = tiny_lm(window=window, softcap=softcap)
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(0, 50, n) for n in lengths]
    calls: list[list[tuple[int, int]]] = []
    done = [0] * len(lengths)
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        rows: list[tuple[int, int]] = []
        for s, n in enumerate(lengths):
            take = int(rng.integers(0, n - done[s] + 1))
            rows += [(s, p) for p in range(done[s], done[s] + take)]
            done[s] += take
        if rows:
            calls.append(rows)
    found = feed(step_of(module)["step"], weights, sequences, calls, seed)
    for tokens, logits in zip(sequences, found, strict=True):
        expected = interpret(module["forward"], [tokens[None]], weights)["logits"][0]
        np.testing.assert_allclose(logits, expected, rtol=1e-11, atol=1e-11)


def test_selected_rows_only_and_last_layer_reduced() -> None:
    """Only the wanted rows come out, and the last layer's query and MLP run on them alone."""
    module, weights = tiny_lm()
    step = step_of(module)["step"]
    full = [n for n in step.nodes if n.op.name == "linear" and str(n.shape[1]) == "rows"]
    wanted = [n for n in step.nodes if n.op.name == "linear" and str(n.shape[1]) == "outputs"]
    assert (len(full), len(wanted)) == (7 + 2, 5 + 1)  # one whole layer and k, v; then q, o, gate, up, down, head


def test_fusion_keeps_every_value() -> None:
    """Joined and fused steps compute the very same numbers, in fewer launches."""
    module, weights = tiny_lm(window=3)
    context = PassContext()
    plain = step_of(module)
    fused = Fuse().run(JoinLinears().run(plain, context), context)
    verify(fused)
    assert parse_module(print_module(fused)) is fused
    rows = [(0, p) for p in range(6)]
    a, b = (feed(m["step"], weights, [np.arange(6) * 7 % 50], [rows[:4], rows[4:]], 3)[0] for m in (plain, fused))
    np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)
    launches = [[n for n in m["step"].nodes if n.op.name not in FREE] for m in (plain, fused)]
    assert (len(launches[0]), len(launches[1])) == (62, 40)


@pytest.mark.parametrize("rounded", [False, True])
def test_hidden_states(rounded: bool) -> None:
    """The value before the head's product, of the selected rows, unrounded; the logits are the same expression as without."""
    module, weights = tiny_lm(softcap=2.0)
    if rounded:
        module = RoundActivations().run(Quantize(bits=8).run(module, PassContext()), PassContext())
    step = Incremental(hidden=True).run(module, PassContext())
    verify(step)
    assert parse_module(print_module(step)) is step
    plain = step_of(module)["step"]
    with_hidden = step["step"]
    assert with_hidden.params == plain.params
    results = dict(zip(with_hidden.result_names, with_hidden.results, strict=True))
    hidden = results.pop("hidden")
    assert results == dict(zip(plain.result_names, plain.results, strict=True))
    assert hidden.type == Tensor("f32", (with_hidden.results[0].shape[0], 32)) and hidden.inputs[0].op.name == "rms_norm"
    rows = np.arange(5, dtype=np.int32)
    inputs = {"tokens": rows, "positions": rows, "sequence": 0 * rows, "slots": rows, "table": rows[None], "selected": rows[2:4]}
    state = {p.attrs["name"]: np.zeros((2, SLOTS, 8)) for p in with_hidden.params[6:]}
    found = interpret(with_hidden, {**inputs, **state}, weights)
    if not rounded:
        np.testing.assert_allclose(found["hidden"] @ weights["embedding"].T, found["logits"], rtol=1e-12)
    assert found["hidden"].shape == (2, 32) and np.allclose((found["hidden"] / weights["norm"]).std(-1), 1, atol=0.3)


def test_mixed_tokens() -> None:
    """A row of one token with the weight 1 is that token, to the bit; a mixture is the sum of embeddings."""
    module, weights = tiny_lm()
    plain, mixed = step_of(module)["step"], Incremental(mix=3).run(module, PassContext())["step"]
    verify(Module([mixed]))
    rows = np.arange(4, dtype=np.int32)
    common = {"positions": rows, "sequence": 0 * rows, "slots": rows, "table": rows[None], "selected": rows}
    state = {p.attrs["name"]: np.zeros((2, SLOTS, 8)) for p in plain.params[6:]}
    tokens = np.array([[5, 1, 2], [6, 6, 6], [7, 0, 49], [8, 3, 4]], np.int32)
    wanted = interpret(plain, {**common, **state, "tokens": tokens[:, 0]}, weights)["logits"]
    single = np.array([[1.0, 0.0, 0.0]] * 4)
    got = interpret(mixed, {**common, **state, "tokens": tokens, "weights": single}, weights)["logits"]
    np.testing.assert_array_equal(got, wanted)
    shares = np.random.default_rng(0).random((4, 3))
    other = dict(weights, embedding=weights["embedding"].astype(np.float64))
    other["embedding"][:4] = np.einsum("rk,rkd->rd", shares, weights["embedding"][tokens])
    found = interpret(mixed, {**common, **state, "tokens": tokens, "weights": shares}, weights)
    sums = interpret(plain, {**common, **state, "tokens": rows}, other)
    np.testing.assert_allclose(found["k_cache_1"], sums["k_cache_1"], rtol=1e-9, atol=1e-12)


def test_mixed_tokens_need_an_embedding() -> None:
    """Token ids that something else reads cannot be mixed."""
    ids = ops.param(name="input_ids", type=Tensor("i64", (BATCH, TOKENS)))
    x = ops.embedding(ops.weight(name="e", type=Tensor("f32", (50, 8))), ids)
    marked = ops.reduce_sum(x, axes=(2,)) + ops.cast(ids, dtype="f32")
    logits = ops.linear(ops.reshape(marked, shape=(BATCH, TOKENS, 1)), ops.weight(name="h", type=Tensor("f32", (50, 1))))
    module = Module([Function("forward", [ids], {"logits": logits})], {"kind": "causal_lm"})
    with pytest.raises(PassError, match="add reads the token ids, so tokens cannot be mixed"):
        Incremental(mix=2).run(module, PassContext())


def test_hidden_states_need_a_head() -> None:
    """A model whose logits come out of a lookup has no hidden state."""
    ids = ops.param(name="input_ids", type=Tensor("i64", (BATCH, TOKENS)))
    table = ops.embedding(ops.weight(name="bigrams", type=Tensor("f32", (50, 50))), ids)
    module = Module([Function("forward", [ids], {"logits": table})], {"kind": "causal_lm"})
    with pytest.raises(PassError, match="no linear output head"):
        Incremental(hidden=True).run(module, PassContext())


@pytest.mark.parametrize("broken", ["mean", "reverse", "bidirectional", "length"])
def test_mixing_positions_is_an_error(broken: str) -> None:
    """What cannot be decoded step by step is refused, naming the operation."""
    ids = ops.param(name="input_ids", type=Tensor("i64", (BATCH, TOKENS)))
    x = ops.embedding(ops.weight(name="e", type=Tensor("f32", (50, 8))), ids)
    if broken == "mean":
        x = x + ops.reduce_sum(x, axes=(1,), keepdims=True)
    elif broken == "reverse":
        x = ops.reshape(ops.transpose(x, axes=(0, 2, 1)), shape=(BATCH, TOKENS, 8))
    elif broken == "length":
        x = x * ops.cast(ops.size_value(size=TOKENS), dtype="f32")
    else:
        heads = ops.reshape(x, shape=(BATCH, 1, TOKENS, 8))
        x = ops.reshape(ops.attention(heads, heads, heads, causal=False, scale=1.0), shape=(BATCH, TOKENS, 8))
    module = Module([Function("forward", [ids], {"logits": x})], {"kind": "causal_lm"})
    names = {"mean": "reduce_sum", "reverse": "reshape", "length": "size_value", "bidirectional": "attention"}
    with pytest.raises(PassError, match=f"{names[broken]}.* mixes positions"):
        Incremental().run(module, PassContext())
