"""Programs on a loaded model: results, Python functions, kept values, interruption, threads, statistics, errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest

import stemma
from stemma.backends.cpu.device import Turns
from stemma.ir import CompileError
from stemma.ir import trace as p
from stemma.runtime import DeviceError, InputError, Model
from tests import fake

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with stemma.load(fake.write(tmp_path_factory.mktemp("programs") / "fake.stemma"), threads=2) as loaded:
        yield loaded


def follow(ids: list[int], count: int) -> list[int]:
    """The next `count` tokens, whatever they are."""
    found: list[int] = []
    while len(found) < count:
        found.append(fake.peak([*ids, *found]))
    return found


@p.program
def best(model: p.Model, prompt: p.Tokens, *, max_new_tokens: int = 8, scale: float = 0.5, steps: p.Fixed[int] = 1) -> Any:
    text = model.start(prompt[:-1])

    def body(token: Any) -> Any:
        token = text.step(token).argmax()
        p.emit(token)
        return p.emitted() < max_new_tokens, token

    p.loop(body, prompt[-1:])
    return {"length": text.length(), "scaled": p.array([1.0, 2.0, steps]) * scale}


@p.program
def judged(model: p.Model, prompt: p.Tokens) -> Any:
    """Emits what a Python function answers to each state of the text, until that is negative."""
    text = model.start(prompt[:-1])

    def body(token: Any) -> Any:
        logits = text.step(token)
        token = p.host("judge", logits.argmax(), text.length(), type=("i32", (1,)))
        p.emit(token)
        return token[0] >= 0, token

    p.loop(body, prompt[-1:])


@p.program
def endless(model: p.Model, prompt: p.Tokens) -> None:
    """Begins again whenever the context is nearly full."""

    def again(count: Any) -> Any:
        text = model.start(prompt[:-1])

        def body(token: Any, left: Any) -> Any:
            token = text.step(token).argmax()
            p.emit(token)
            return left > 0, token, left - 1

        p.loop(body, prompt[-1:], 50)
        return count >= 0, count

    p.loop(again, 0)


@p.program
def counting(model: p.Model, prompt: p.Tokens, runs: Annotated[p.Value, p.Kept("i32", 1)]) -> Any:
    p.emit(prompt[:1])
    return {"runs": runs + 1}


def test_a_program_gives_tokens_results_and_statistics(model: Model) -> None:
    found = model.run(best, [3, 7], max_new_tokens=12, scale=2.0)
    assert found.tokens == follow([3, 7], 12)
    assert found.results["length"].tolist() == [13] and found.results["scaled"].tolist() == [2.0, 4.0, 2.0]
    assert found.results["scaled"].dtype == np.float32
    s = found.statistics
    assert (s.prompt_tokens, s.new_tokens, s.decoded_tokens, s.finish) == (2, 12, 11, ["length"])
    assert s.models["model"]["calls"] == 12 and s.models["model"]["rows"] == 13 and s.models["model"]["seconds"] > 0
    assert s.machine_seconds >= s.models["model"]["seconds"] and (s.trees, s.followed_per_tree, s.drafting_share) == (0, 0.0, 0.0)
    assert model.run(best, [3, 7]).tokens == follow([3, 7], 8)
    assert model.run(best, [3, 7], steps=9).results["scaled"].tolist() == [0.5, 1.0, 4.5]
    assert model.generate_ids([[3, 7], [5]], program=best) == [follow([3, 7], 8), follow([5], 8)]
    assert model.run("generate", [3, 7], max_new_tokens=5).tokens == fake.greedy([3, 7], 5)
    assert "".join(model.stream([3, 7], program=best)) == model.generate([3, 7], program=best)
    assert list(model.programs) == ["generate"] and model.programs["generate"].option("top_k") is not None


def test_the_context_ends_a_program_with_a_warning(model: Model) -> None:
    prompt = [7] * (fake.CONTEXT - 3)
    with pytest.warns(UserWarning, match="fill the model's context of 96 tokens"):
        assert model.run(best, prompt).tokens == follow(prompt, 3)
    with pytest.raises(DeviceError, match="The program 'endless' stopped: .*96"):
        model.run(endless, [7] * 60)


def test_programs_call_python_functions(model: Model) -> None:
    seen = []

    def judge(token: Any, length: Any) -> Any:
        seen.append((token.tolist(), length.tolist(), token.dtype.name))
        return np.array([-1]) if len(seen) == 3 else token + 1

    found = model.run(judged, [3], host={"judge": judge})
    first = fake.peak([3]) + 1
    second = fake.peak([3, first]) + 1
    assert found.tokens == [first, second]
    assert seen == [([first - 1], [1], "int32"), ([second - 1], [2], "int32"), ([fake.peak([3, first, second])], [3], "int32")]


def test_what_python_functions_do_wrong(model: Model) -> None:
    class Odd(Exception):
        pass

    def fails(*_: Any) -> Any:
        raise Odd("as it is")

    for error in (Odd, KeyboardInterrupt):

        def raises(*_: Any, error: Any = error) -> Any:
            raise error

        with pytest.raises(error):
            model.run(judged, [3], host={"judge": raises})
        assert model.generate_ids([3], max_new_tokens=9) == fake.greedy([3], 9)
    for host, message in (
        ({}, "The program calls the Python function 'judge'; given: none"),
        ({"other": fails}, "given: other. Pass it by name: host={'judge': function}"),
        ({"judge": lambda *_: np.zeros(2, int)}, "'judge' returned .*sizes \\[2\\]"),
        ({"judge": lambda *_: [0.5]}, "the result of judge' must hold integers"),
        ({"judge": lambda *_: [2**40]}, "which i32 cannot hold"),
    ):
        with pytest.raises(InputError, match=message):
            model.run(judged, [3], host=host)


def test_kept_values_go_from_run_to_run(model: Model) -> None:
    assert [model.run(counting, [3]).results["runs"].tolist() for _ in range(3)] == [[1], [2], [3]]
    assert counting.fix("another") is not counting
    assert model.run(counting.fix("another"), [3]).results["runs"].tolist() == [1]


@pytest.mark.parametrize("call", ["run", "stream"])
def test_an_interrupt_ends_a_program_and_leaves_the_model_usable(model: Model, call: str) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background suite may have ignored
    timer = threading.Timer(0.15, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            if call == "run":
                model.run(endless, [3])
            else:
                for _ in model.stream([3], program=endless):
                    pass
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert model.last_statistics.new_tokens > 50 and model.last_statistics.finish == ["closed"]
    assert model.generate_ids([[3], [5]], max_new_tokens=9) == [fake.greedy([3], 9), fake.greedy([5], 9)]


def test_a_long_program_lets_other_threads_have_their_turn(model: Model) -> None:
    class Done(Exception):
        pass

    running, done, ended = threading.Event(), threading.Event(), threading.Event()

    def judge(token: Any, length: Any) -> Any:
        running.set()
        if done.is_set():
            raise Done
        return token if length[0] < 50 else token * 0 - 1

    def work() -> None:
        try:
            while True:
                model.run(judged, [3], host={"judge": judge})
        except Done:
            ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert running.wait(20)
        for ids in ([3], [5, 7], [9]):
            assert model.generate_ids(ids, max_new_tokens=20) == fake.greedy(ids, 20)
    finally:
        done.set()
        thread.join()
    assert ended.is_set()


@p.program
def drafted(model: p.Model, prompt: p.Tokens, *, max_new_tokens: int = 24) -> None:
    """A Python function drafts three tokens after the last; as many as are right are taken in one call of the model."""
    text = model.start(prompt[:-1])

    def turn(token: Any) -> Any:
        tree = p.tree(token, 4, size=4)
        guesses = p.host("draft", text.history(0, fake.CONTEXT), token, type=("i32", (3,)))
        for i in range(3):
            tree.extend(p.array([i]), guesses[i : i + 1], p.array([1.0]))
        text.expand(tree, fresh=4)

        def step(token: Any) -> Any:
            token = text.follow(token).argmax()
            p.emit(token)
            return (p.emitted() < max_new_tokens) & text.has_child(token), token

        token = p.loop(step, token)
        text.settle()
        return p.emitted() < max_new_tokens, token

    p.loop(turn, prompt[-1:])


@pytest.mark.parametrize("right", [0, 1, 3])
def test_statistics_of_drafted_trees(model: Model, right: int) -> None:
    def draft(history: Any, token: Any) -> Any:
        ids = [int(t) for t in history[0] if t >= 0] + [int(token[0])]
        return [(t + (i >= right)) % fake.VOCAB for i, t in enumerate(follow(ids, 3))]

    found = model.run(drafted, [3, 7], host={"draft": draft})
    s, trees = found.statistics, 24 // (right + 1)
    assert found.tokens == follow([3, 7], 24)
    assert (s.trees, s.nodes, s.followed) == (trees, 4 * trees, 24) and s.followed_per_tree == right + 1
    assert s.models["model"]["calls"] == trees


@p.program
def longer(model: p.Model, prompt: p.Tokens, other: p.Tokens) -> Any:
    """Emits the longer of two rows of tokens."""
    sizes: list[Any] = [p.as_value(text.shape[0]) for text in (prompt, other)]
    p.emit(p.where(sizes[0] > sizes[1], prompt[:1], other[:1]))


def test_a_program_may_take_several_texts(model: Model) -> None:
    assert model.run(longer, [3, 4], other=[5, 6, 7]).tokens == [5]
    assert model.run(longer, [3, 4], other=np.array([5])).tokens == [3]
    assert model.run(longer, [3], other="def quick").tokens == [0]  # its first token
    with pytest.raises(InputError, match="needs other"):
        model.run(longer, [3])
    with pytest.raises(InputError, match="sizes \\[1, 1\\]; the program takes i32\\[other_length\\]"):
        model.run(longer, [3], other=[[5]])


def test_turns_come_in_the_order_of_asking() -> None:
    turns, order = Turns(), []

    def work(number: int) -> None:
        with turns:
            order.append(number)

    threads = []
    with turns:
        for number in range(5):
            threads.append(threading.Thread(target=work, args=(number,)))
            threads[-1].start()
            while len(turns._waiting) <= number:
                pass
        gate = turns._waiting[2]
        turns._waiting.remove(gate)  # as an interrupted thread does
        turns._waiting.append(gate)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 3, 4, 2]
    with turns:
        order.append(5)


def test_wrong_options_and_programs(model: Model) -> None:
    calls: list[tuple[Any, str]] = [
        (lambda: model.run(best, [3], heat=1), "no option heat. The program 'best' has: max_new_tokens, scale"),
        (lambda: model.run(best, [3], scale="x"), "scale='x' must be a number"),
        (lambda: model.run("beam", [3]), "has no program 'beam'; its programs: generate"),
        (lambda: model.run(best, [3], max_new_tokens=0), "max_new_tokens=0"),
        (lambda: model.run(best, [fake.VOCAB]), "token id 320"),
        (lambda: model.generate_ids([3], program=best, sequence=3), "no option sequence"),
    ]
    for call, message in calls:
        with pytest.raises(InputError, match=message):
            call()
    for wrong in (3, None, len, lambda model, prompt: None):
        with pytest.raises(CompileError, match="is no decoding program: give a function with the decorator @program"):
            model.run(wrong, [3])

    @p.program
    def wide(model: p.Model, prompt: p.Tokens) -> Any:
        return {"x": p.call("absent", prompt, type=("f32", (1,)))}

    with pytest.raises(CompileError, match="call \\(test_runtime_programs.py:.* names 'absent'; compiled functions: none"):
        model.run(wide, [3])


def test_running_an_artifact_needs_no_compiler(model: Model) -> None:
    script = (
        "import sys, stemma\n"
        f"with stemma.load({str(model.path)!r}) as m:\n"
        "    print(m.generate_ids([3], max_new_tokens=5), m.run('generate', [3]).tokens[:2])\n"
        "assert not {'stemma.ir', 'stemma.codegen', 'jinja2'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.stdout.strip() == f"{fake.greedy([3], 5)} {fake.greedy([3], 2)}", done.stderr
