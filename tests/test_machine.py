"""The decoding machine on fake models against the reference interpreter: sequences, trees, batches, cache, limits, damage."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemma.ir import Function, Node, State, StemmaError, Tensor, dim, ops
from tests.machine import CONTEXT, Fake, same

pytestmark = pytest.mark.quick
VOCAB = 9


def ints(*values: int) -> Node:
    return ops.array(values=values, dtype="i32")


def i32(value: int) -> Node:
    return ops.constant(value=value, dtype="i32")


def param(name: str, type: Any) -> Node:
    return ops.param(name=name, type=type)


def prompt(name: str = "prompt") -> Node:
    return param(name, Tensor("i32", (dim(f"{name}_length", 0, CONTEXT),)))


def start(tokens: Node, model: str = "model") -> Node:
    return ops.start(tokens, model=model, vocab=VOCAB, width=2 if model == "model" else 0)


def parts(node: Node, count: int = 3) -> list[Node]:
    return [ops.get(node, index=i) for i in range(count)]


class Writer:
    """Writes a random program: every operation takes any earlier value, so that values stay in use while others go on from them."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.results: dict[str, Node] = {}
        text = prompt()
        # Sequences: (node, model, count, tree node or None, nodes run, path followed, tokens of its tree as (parent, token))
        self.params = [text]
        self.values: list[tuple[Node, str, int, Node | None, int, tuple[int, ...], tuple[tuple[int, int], ...]]] = [
            (start(text, model), model, 1, None, 0, (), ()) for model in ("model", "draft")
        ]

    def pick(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def tokens(self, count: int, low: int = 0) -> Node:
        return ints(*(self.pick(low, VOCAB - 1) for _ in range(count)))

    def keep(self, *nodes: Node) -> None:
        for node in nodes:
            self.results[f"r{len(self.results)}"] = node

    def write(self, length: int) -> Function:
        for _ in range(length):
            index = self.pick(max(0, len(self.values) - 4), len(self.values) - 1)
            value = self.values[index]
            node, _, count, _, _, path, _ = value
            choice = self.pick(0, 9)
            if choice <= 1:
                self.step(value)
            elif choice == 2 and count == 1:
                self.feed(value)
            elif choice == 3:
                self.fork(value)
            elif choice == 4:
                self.sync(value)
            elif choice <= 6 and count == 1 and not path:
                self.expand(value)
            elif choice <= 8 and count == 1:
                self.follow(value)
            else:
                self.keep(ops.length(node), ops.history(node, i32(self.pick(0, 5)), size=self.pick(0, 9)))
        return Function("f", self.params, self.results or {"length": ops.length(self.values[0][0])})

    def settled(self, value: Any) -> Node:
        return ops.settle(value[0]) if value[3] is not None else value[0]

    def step(self, value: Any) -> None:
        after, logits, hidden = parts(ops.step(self.settled(value), self.tokens(value[2], -1)))
        self.keep(logits, hidden)
        self.values.append((after, value[1], value[2], None, 0, (), ()))

    def feed(self, value: Any) -> None:
        after, logits, hidden = parts(ops.feed(self.settled(value), self.tokens(self.pick(1, 7))))
        self.keep(logits, hidden)
        self.values.append((after, value[1], 1, None, 0, (), ()))

    def fork(self, value: Any) -> None:
        indices = [self.pick(0, value[2] - 1) for _ in range(self.pick(1, 4))]
        self.values.append((ops.fork(self.settled(value), ints(*indices)), value[1], len(indices), None, 0, (), ()))

    def sync(self, value: Any) -> None:
        others = [v for v in self.values if v[2] == value[2] and v[1] != value[1]]
        if others:
            other = others[self.pick(0, len(others) - 1)]
            self.values.append((ops.sync(value[0], other[0]), value[1], value[2], None, 0, (), ()))

    def expand(self, value: Any) -> None:
        node, model, _, tree, ran, _, nodes = value
        if tree is None:
            root = self.pick(0, VOCAB - 1)
            tree, nodes = ops.tree(ints(root), i32(20), size=16), ((-1, root),)
        parents, tokens = [], []
        for _ in range(self.pick(0, 5)):
            parents.append(self.pick(0, len(nodes) - 1))
            tokens.append(self.pick(0, 3))
            if (parents[-1], tokens[-1]) not in nodes and len(nodes) < 16:
                nodes = (*nodes, (parents[-1], tokens[-1]))
        if parents:
            scores = ops.array(values=(0.5,) * len(parents), dtype="f32")
            tree, numbers = parts(ops.tree_extend(tree, ints(*parents), ints(*tokens), scores, source=1), 2)
            self.keep(numbers)
        after, logits, hidden = parts(ops.expand(node, tree, fresh=self.pick(1, 16)))
        self.keep(logits, hidden)
        self.values.append((after, model, 1, tree, len(nodes), (), nodes))

    def follow(self, value: Any) -> None:
        node, model, _, tree, ran, path, nodes = value
        self.keep(ops.has_child(node, self.tokens(1)))
        children = [i for i in range(ran) if nodes[i][0] == (path[-1] if path else -1)]
        if not children:
            return
        chosen = children[self.pick(0, len(children) - 1)]
        after, logits, hidden = parts(ops.follow(node, ints(nodes[chosen][1])))
        self.keep(logits, hidden, ops.followed_path(after, size=3))
        self.values.append((after, model, 1, tree, ran, (*path, chosen), nodes))
        if self.pick(0, 2) == 0:
            self.values.append((ops.settle(after), model, 1, None, 0, (), ()))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.sampled_from([1, 3, 8, 64]), sequences=st.sampled_from([20, 64]), outputs=st.sampled_from([0, 1]))
def test_random_programs(data: Any, rows: int, sequences: int, outputs: int) -> None:
    """Values of programs that fork, expand, follow and go back to earlier values are those of the reference, alone and together."""
    function = Writer(data.draw).write(data.draw(st.integers(1, 14)))
    prompts = [
        np.array(p, np.int32) for p in data.draw(st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=20), min_size=1, max_size=4))
    ]
    fake = Fake(function, max_rows=rows, max_sequences=sequences, min_outputs=outputs)
    expected = [fake.expect(function, prompt=p) for p in prompts]
    for p, e in zip(prompts, expected, strict=True):
        same(fake.run("f", prompt=p), e)
    started = [fake.start("f", prompt=p) for p in prompts * 3]
    assert fake.advance() == 0
    for id, e in zip(started, expected * 3, strict=True):
        same(fake.outcome(id), e)
    assert fake.used() == [0, 0]
    assert fake.seen("most_rows") <= rows
    fake.close()


# ---- programs by hand -------------------------------------------------------------------------------------------------


def stepped(token: int = 3, name: str = "f") -> Function:
    """A prompt and one token."""
    text = prompt()
    after, logits, hidden = parts(ops.step(start(text), ints(token)))
    return Function(name, [text], {"logits": logits, "hidden": hidden, "length": ops.length(after)})


def endless() -> Function:
    """Emits and steps token 1 as long as the host function `decide` says; it is given how many were emitted."""
    text, output = prompt(), param("output", State("output"))
    s, out = param("s", start(text).type), param("o", State("output"))
    emitted = ops.emit(out, ints(1))
    again = ops.host(ops.emitted(emitted), function="decide", type=Tensor("bool", ()))
    body = Function("", [s, out], {"again": again, "s": ops.get(ops.step(s, ints(1)), index=0), "o": emitted})
    looped = ops.loop(start(text), output, body=body)
    return Function("endless", [text, output], {"output": ops.get(looped, index=1), "n": ops.length(ops.get(looped, index=0))})


def forever(step: bool) -> Function:
    """A loop that never ends: it steps, or does nothing at all."""
    text = prompt()
    s, again = param("s", start(text).type), param("again", Tensor("bool", ()))
    body = Function("", [s, again], {"go": again, "s": ops.get(ops.step(s, ints(1)), index=0) if step else s, "again": again})
    looped = ops.loop(start(text), ops.constant(value=True, dtype="bool"), body=body)
    return Function("forever", [text], {"n": ops.length(ops.get(looped, index=0))})


def serve(fake: Fake, limit: int) -> None:
    """Answer every wish of a host function (go on while fewer than `limit` were emitted) until all is done."""
    while fake.advance() != 0:
        for id in range(1, 20):
            if fake.status(id) == 3:
                name, (count,) = fake.request(id)
                assert name == "decide"
                fake.reply(id, np.bool_(count < limit))


def test_long_prompts_run_in_chunks() -> None:
    """Prompts longer than a call may be go in over several calls, beside shorter ones that do not wait for them."""
    function, short = stepped(), stepped(4, "short")
    fake = Fake(function, short, max_rows=4)
    long = np.arange(90, dtype=np.int32) % VOCAB
    first, second = fake.start("f", prompt=long), fake.start("short", prompt=long[:2])
    calls = 0
    while fake.status(second) == 0 and calls < 100:
        fake.advance(nanoseconds=1)
        calls = fake.seen("calls")
    assert fake.status(first) == 0 and fake.seen("rows") < 91
    assert fake.advance() == 0
    same(fake.outcome(first), fake.expect(function, prompt=long))
    same(fake.outcome(second), fake.expect(short, prompt=long[:2]))
    assert fake.seen("most_rows") == 4 and fake.used() == [0, 0]


def test_the_cache_grows() -> None:
    """More tokens than the first cache holds: what it held moves along."""
    function = stepped()
    fake = Fake(function, max_rows=64)
    prompts = [np.random.default_rng(i).integers(0, VOCAB, 10 + i, dtype=np.int32) for i in range(40)]
    ids = [fake.start("f", prompt=p) for p in prompts]
    assert fake.advance() == 0
    for id, p in zip(ids, prompts, strict=True):
        same(fake.outcome(id), fake.expect(function, prompt=p))
    assert fake.used() == [0, 0]


def test_instances_wait_for_room_and_the_youngest_gives_way() -> None:
    """When the cache is full, instances wait for others to end; when all wait, the youngest fails, and the others go on."""
    fake = Fake(endless(), max_slots=64)
    ids = [fake.start("endless", prompt=np.zeros(20, np.int32)) for _ in range(5)]
    serve(fake, 1)
    assert [fake.status(i) for i in ids] == [1] * 5  # three at first, two when those were done
    assert [fake.result(i, "n") for i in ids] == [21] * 5
    ids = [fake.start("endless", prompt=np.zeros(20, np.int32)) for _ in range(3)]
    serve(fake, 30)
    assert [fake.status(i) for i in ids] == [1, 2, 2]  # 50 tokens of 64
    for id in ids[1:]:
        assert "no room in the cache of the model 'model'" in fake.error(id)
    for id in range(1, 10):
        fake.release(id)
    assert fake.used() == [0, 0]


def test_cancelling_frees_everything() -> None:
    """An instance that is released in the middle of a chunked prompt, or while it waits for a host function, leaves nothing."""
    fake = Fake(stepped(), endless(), max_rows=4)
    first, second = fake.start("f", prompt=np.zeros(50, np.int32)), fake.start("endless", prompt=np.zeros(3, np.int32))
    for _ in range(4):
        fake.advance(nanoseconds=1)
    assert fake.used()[0] > 50 and fake.status(first) == 0
    fake.release(first)
    assert fake.used()[0] < 5
    while fake.status(second) != 3:
        fake.advance()
    fake.release(second)
    assert fake.used() == [0, 0] and fake.advance() == 0
    assert fake.status(second) == -1 and fake.tokens(second) == []
    running = fake.start("f", prompt=np.zeros(50, np.int32))
    fake.advance(nanoseconds=1)
    assert fake.status(running) == 0
    fake.close()  # with an instance in the middle of its prompt


def test_host_functions() -> None:
    """A host function gets arrays; a wrong type, or its error, ends its instance alone."""
    fake = Fake(endless())
    text = np.array([2, 3], np.int32)
    ids = [fake.start("endless", prompt=text) for _ in range(4)]
    while any(fake.status(i) != 3 for i in ids):
        assert fake.advance() == 2
    name, (count,) = fake.request(ids[0])
    assert (name, count.tolist(), count.dtype) == ("decide", 1, np.int32)
    assert fake.reply(ids[1], np.int32(1)) == 1
    assert "'decide' returned a value of another type" in fake.error(ids[1])
    assert fake.reply(ids[2], error="division by zero") == 1 and fake.error(ids[2]) == "division by zero"
    assert fake.reply(ids[0], np.bool_(True)) == 0 and fake.reply(ids[0], np.bool_(True)) == 1
    serve(fake, 3)
    assert [fake.status(i) for i in ids] == [1, 2, 2, 1]
    expected = fake.expect(endless(), {"decide": lambda n: np.bool_(n < 3)}, prompt=text)
    same((fake.tokens(ids[0]), {"n": fake.result(ids[0], "n")}), expected)


def test_advance_stops_for_tokens() -> None:
    """`advance` returns once that many tokens were emitted, and goes on where it was."""
    text = prompt()
    s, out = start(text), param("output", State("output"))
    o: Node = out
    for _ in range(6):
        s, logits, _ = parts(ops.step(s, ints(2)))
        o = ops.emit(o, ops.concat(ops.cast(ops.argmax(logits, axis=1), dtype="i32"), ints(-1, 8), axis=0))
    function = Function("f", [text, out], {"output": o, "n": ops.length(s)})
    fake = Fake(function)
    id = fake.start("f", prompt=np.zeros(3, np.int32))
    counts = []
    while fake.advance(tokens=1):
        counts.append(len(fake.tokens(id)))
    assert counts == [2, 4, 6, 8, 10]  # and with the last two it is done
    assert fake.statistics(id)[1] == 12 and fake.statistics(id)[7:10] == [6, 9, 6]
    same(fake.outcome(id), fake.expect(function, prompt=np.zeros(3, np.int32)))


def test_loops_that_go_nowhere_end() -> None:
    """A loop without model calls or tokens fails after 2^20 turns, a time limit stops it before, and steps keep it alive."""
    idle, busy = Fake(forever(False)), Fake(forever(True))
    id = idle.start("forever", prompt=np.zeros(1, np.int32))
    assert idle.advance(nanoseconds=1000) == 1 and idle.status(id) == 0
    assert idle.advance() == 0
    assert "may never end" in idle.error(id)
    id = busy.start("forever", prompt=np.zeros(1, np.int32))
    assert busy.advance() == 0
    assert "longer than the context of the model 'model' (100 tokens)" in busy.error(id)


def test_errors_end_one_instance() -> None:
    """Tokens outside the vocabulary, texts beyond the context, a failing kernel: an error text, and the next instance runs."""
    function = stepped()
    fake = Fake(function)
    good = np.array([1, 2], np.int32)
    for bad, message in (
        ([1, 9], "token 9 is not in the vocabulary"),
        ([-1], "token -1 is not in"),
        ([0] * 100, "longer than the context"),
    ):
        ids = [fake.start("f", prompt=np.array(bad, np.int32)), fake.start("f", prompt=good)]
        fake.advance()
        assert message in fake.error(ids[0])
        same(fake.outcome(ids[1]), fake.expect(function, prompt=good))
    fake.set("calls_left", 0)
    with pytest.raises(RuntimeError, match="kernels of the model 'model' failed with the status 7"):
        fake.run("f", prompt=good)
    fake.set("calls_left", -1)
    for id in range(1, 20):
        fake.release(id)
    assert fake.used() == [0, 0]
    same(fake.run("f", prompt=good), fake.expect(function, prompt=good))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "needs the input 'prompt'"),
        ({"prompt": good, "x": good}, "no input 'x'"),
        ({"prompt": good.astype(np.int64)}, "wrong type"),
        ({"prompt": good[None]}, "number of axes"),
    ]
    for inputs, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            fake.start("f", **inputs)
    with pytest.raises(RuntimeError, match="no program 'g'"):
        fake.start("g")


def test_mixed_tokens() -> None:
    """A step on a weighted sum of embeddings, between plain tokens."""
    text = prompt()
    tokens, weights = param("tokens", Tensor("i32", (2, 2))), param("weights", Tensor("f32", (2, 2)))
    mixed, logits, hidden = parts(ops.step_mixed(ops.fork(start(text), ints(0, 0)), tokens, weights))
    after, more, _ = parts(ops.step(mixed, ints(5, 6)))
    function = Function("f", [text, tokens, weights], {"logits": logits, "hidden": hidden, "more": more, "n": ops.length(after)})
    given: dict[str, Any] = {
        "prompt": np.array([1, 2, 3], np.int32),
        "tokens": np.array([[1, 2], [3, 4]], np.int32),
        "weights": np.array([[0.25, 0.75], [1.0, 0.0]], np.float32),
    }
    fake = Fake(function, mix=3, max_rows=3)
    same(fake.run("f", **given), fake.expect(function, **given))
    with pytest.raises(RuntimeError, match="compiled for at most 1"):
        Fake(function).run("f", **given)


def test_forks_share_an_unread_prompt() -> None:
    """A prompt that several sequences continue goes through the model once."""
    text = prompt()
    _, logits, _ = parts(ops.step(ops.fork(start(text), ints(0, 0, 0, 0)), ints(1, 2, 3, 4)))
    function = Function("f", [text], {"logits": logits})
    given = np.arange(30, dtype=np.int32) % VOCAB
    fake = Fake(function, max_rows=64)
    same(fake.run("f", prompt=given), fake.expect(function, prompt=given))
    assert fake.seen("rows") == 34 and fake.seen("jumps") == 3


def test_trees_end_at_the_context() -> None:
    """Nodes beyond the context are not run and not followed; the others are."""
    text = prompt()
    scores = ops.array(values=(1.0,) * 3, dtype="f32")
    tree = ops.get(ops.tree_extend(ops.tree(ints(1), i32(8), size=8), ints(0, 1, 2), ints(2, 3, 4), scores), index=0)
    s, logits, _ = parts(ops.expand(start(text), tree, fresh=4))
    found = {"logits": logits}
    for i, token in enumerate((1, 2, 3)):
        found[f"has{i}"] = ops.has_child(s, ints(token))
        if i < 2:
            s, found[f"follow{i}"], _ = parts(ops.follow(s, ints(token)))
    function = Function("f", [text], found)
    given = np.arange(98, dtype=np.int32) % VOCAB
    fake = Fake(function, max_rows=64)
    _, result = fake.run("f", prompt=given)
    _, expected = fake.expect(function, prompt=given)
    for name in ("has0", "has1", "follow0", "follow1"):
        np.testing.assert_array_equal(result[name], expected[name])
    np.testing.assert_array_equal(result["logits"][:2], expected["logits"][:2])
    assert not result["has2"] and not result["logits"][2:].any()
    with pytest.raises(RuntimeError, match="longer than the context"):
        fake.run("f", prompt=np.zeros(100, np.int32))


def one_node(root: int) -> Node:
    return ops.tree(ints(root), i32(8), size=8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: ops.get(ops.follow(s, ints(2)), index=0), "follow: the tree does not go on with the token 2."),
        (
            lambda s: ops.get(ops.expand(ops.get(ops.follow(s, ints(1)), index=0), one_node(1), fresh=1), index=0),
            "already followed",
        ),
        (
            lambda s: ops.get(ops.expand(s, one_node(2), fresh=1), index=0),
            "expand: the tree is not the one of the last expand, grown",
        ),
        (lambda s: ops.fork(s, ints(0, 1)), "fork: the ind"),
        (lambda s: ops.get(ops.expand(s, ops.tree_merge(one_node(1), one_node(2)), fresh=1), index=0), "tree_merge: the roots are"),
    ],
)
def test_wrong_uses_are_errors(make: Any, message: str) -> None:
    """What the reference refuses, the machine refuses with the same words."""
    text = prompt()
    function = Function("f", [text], {"n": ops.length(make(ops.get(ops.expand(start(text), one_node(1), fresh=1), index=0)))})
    fake, given = Fake(function), np.zeros(2, np.int32)
    with pytest.raises(RuntimeError, match=message):
        fake.run("f", prompt=given)
    with pytest.raises(StemmaError, match=message):
        fake.expect(function, prompt=given)


def test_compiled_functions() -> None:
    """`call` runs a compiled function; sizes that its kernels refuse are an error."""
    n = dim("n", 1, 20)
    x = param("x", Tensor("f32", (n, 2)))
    function = Function("f", [x], {"y": ops.call(x, function="score", type=Tensor("f32", (n,)))})
    fake = Fake(function)
    given = np.arange(10, dtype=np.float32).reshape(5, 2)
    same(fake.run("f", x=given), fake.expect(function, x=given))
    with pytest.raises(RuntimeError, match="refuse these sizes"):
        fake.run("f", x=np.zeros((10, 2), np.float32))


def test_values_that_are_kept() -> None:
    """A parameter that is a result too keeps its value from run to run, unless it is given; a failed run changes nothing."""
    text, table = prompt(), param("table", Tensor("i32", (3,)))
    function = Function("f", [text, table], {"table": ops.add(table, ops.length(ops.get(ops.step(start(text), ints(1)), index=0)))})
    fake = Fake(function)
    values = [fake.run("f", prompt=np.zeros(n, np.int32))[1]["table"].tolist() for n in (0, 4)]
    with pytest.raises(RuntimeError, match="vocabulary"):
        fake.run("f", prompt=np.array([70], np.int32))
    values.append(fake.run("f", prompt=np.zeros(1, np.int32))[1]["table"].tolist())
    values.append(fake.run("f", prompt=np.zeros(1, np.int32), table=np.zeros(3, np.int32))[1]["table"].tolist())
    assert values == [[1] * 3, [6] * 3, [8] * 3, [2] * 3]
