"""Beam search and greedy decoding equal transformers' generate; diverse beam search equals a transcription of the paper."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stemma import program as p
from stemma.ir import World, interpret
from stemma.ir.ops.choose import filtered, gumbel_noise
from stemma.ir.ops.program import OutputValue, ReferenceModel

VOCAB, END, OTHER_END = 50, 35, 22  # tokens that this model often writes
PROMPTS = ([1, 2, 3], [9], [30, 41, 5, 5], [12, 13])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache(maxsize=1)
def llama() -> tuple[Any, ReferenceModel]:
    """A random Llama, and the same as a reference model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=END, pad_token_id=0, initializer_range=0.35,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.eval()

    def compute(tokens: tuple[Any, ...]) -> tuple[Any, Any]:
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0, -1].numpy(), np.zeros(0, np.float32)

    return model, ReferenceModel(compute, VOCAB)


def run(traced: p.TracedProgram, **inputs: Any) -> dict[str, Any]:
    given = {**traced.defaults, **inputs, "output": OutputValue()}
    return interpret(traced.function, given, float_type=np.float32, world=World(models={"model": llama()[1]}))


def specs(*ends: int) -> dict[str, p.ModelSpec]:
    return {"model": p.ModelSpec(VOCAB, 0, ends, 64)}


def expected_text(prompt: list[int], ends: list[int], **options: Any) -> tuple[list[int], Any]:
    """What transformers generates (without padding), and the scores of all beams."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {"do_sample": False, "output_scores": True, "return_dict_in_generate": True, "eos_token_id": ends, **options}
        found = llama()[0].generate(torch.tensor([prompt]), **given)
    text = found.sequences[0].tolist()[len(prompt) :]
    place = next((i + 1 for i, token in enumerate(text) if token in ends), len(text))
    return text[:place], found.get("sequences_scores")


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("beams", [2, 3, 4])
def test_beam_search_is_that_of_transformers(beams: int, early_stopping: bool | str) -> None:
    traced = p.trace(p.PROGRAMS["beam_search"], specs(END), beams=beams, early_stopping=early_stopping)
    ends = set()
    for penalty in (1.0, 0.0, 2.0, -0.5):
        for prompt in PROMPTS:
            options = {"num_beams": beams, "num_return_sequences": beams, "max_new_tokens": 9, "length_penalty": penalty}
            expected, scores = expected_text(prompt, [END], early_stopping=early_stopping, **options)
            found = run(traced, prompt=prompt, max_new_tokens=9, length_penalty=penalty)
            assert list(found["output"].tokens) == expected
            np.testing.assert_allclose(found["scores"], scores.numpy(), rtol=1e-4)
            ends.add((expected[-1] == END, len(expected)))
    assert {e for e, _ in ends} == {True, False} and len(ends) > 3  # the cases are not all alike


def test_beam_search_of_a_model_with_two_end_tokens() -> None:
    traced = p.trace(p.PROGRAMS["beam_search"], specs(END, OTHER_END), beams=3)
    for prompt in PROMPTS:
        expected, _ = expected_text(prompt, [END, OTHER_END], num_beams=3, max_new_tokens=8)
        assert list(run(traced, prompt=prompt, max_new_tokens=8)["output"].tokens) == expected


def test_greedy_decoding_is_that_of_transformers() -> None:
    traced = p.trace(p.PROGRAMS["generate"], specs(END))
    for prompt in PROMPTS:
        for penalty in (1.0, 1.3):
            expected, _ = expected_text(prompt, [END], max_new_tokens=12, repetition_penalty=penalty)
            found = run(traced, prompt=prompt, max_new_tokens=12, repetition_penalty=penalty)
            assert list(found["output"].tokens) == expected


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_sampling_is_the_likeliest_after_filters_and_counted_noise(ignore_eos: bool) -> None:
    traced, model = p.trace(p.PROGRAMS["generate"], specs(END)), llama()[1]
    settings = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2, "presence_penalty": 0.3}
    for prompt in PROMPTS:
        history, expected = list(prompt), list[int]()
        while len(expected) < 10 and (ignore_eos or END not in expected):
            scores = filtered(model(tuple(history))[0], history, *settings.values())  # type: ignore[arg-type]
            expected.append(int(np.argmax(scores + gumbel_noise(5, 3, len(history), VOCAB))))
            history.append(expected[-1])
        options = {**settings, "seed": 5, "sequence": 3, "ignore_eos": ignore_eos}
        assert list(run(traced, prompt=prompt, max_new_tokens=10, **options)["output"].tokens) == expected


# ---- diverse beam search ----------------------------------------------------------------------------------------------


def diverse(
    prompt: list[int], beams: int, groups: int, diversity: float, longest: int, penalty: float
) -> tuple[list[int], list[float]]:
    """Vijayakumar et al. 2018: groups in turn, each a beam search with the Hamming term; ended texts keep their place."""
    model, each = llama()[1], beams // groups
    held: list[list[tuple[float, list[int]]]] = [[(0.0, [])] for _ in range(groups)]
    for _ in range(longest):
        used: list[int] = []
        for group in range(groups):
            found = []
            for total, text in held[group]:
                if text and text[-1] == END:
                    found.append((total, total, text))
                    continue
                logits = model((*prompt, *text))[0].astype(np.float64)
                logp = logits - math.log(np.exp(logits - logits.max()).sum()) - logits.max()
                for token in range(VOCAB):
                    score = total + logp[token]
                    found.append((score - diversity * used.count(token), score, [*text, token]))
            best = sorted(found, key=lambda c: -c[0])[:each]
            open_before = {len(text) for _, text in held[group] if not (text and text[-1] == END)}
            used += [text[-1] for _, _, text in best if len(text) - 1 in open_before and not any(text is t for _, t in held[group])]
            held[group] = [(score, text) for _, score, text in best]
    everything = [(total / len(text) ** penalty, text) for group in held for total, text in group]
    return max(everything, key=lambda c: c[0])[1], [score for score, _ in everything]


@pytest.mark.parametrize("beams, groups, diversity", [(4, 2, 0.5), (4, 4, 1.5), (6, 3, 0.0), (3, 1, 0.7)])
def test_diverse_beam_search(beams: int, groups: int, diversity: float) -> None:
    traced = p.trace(p.PROGRAMS["diverse_beam_search"], specs(END), beams=beams, groups=groups)
    for prompt in PROMPTS:
        expected, scores = diverse(prompt, beams, groups, diversity, 7, 0.8)
        found = run(traced, prompt=prompt, max_new_tokens=7, diversity=diversity, length_penalty=0.8)
        assert list(found["output"].tokens) == expected
        np.testing.assert_allclose(found["scores"], scores, rtol=1e-4)


def test_diversity_separates_the_groups() -> None:
    """Without the term the groups are copies of one another; with it they are not."""
    traced = p.trace(p.PROGRAMS["diverse_beam_search"], specs(END), beams=4, groups=2)
    same = run(traced, prompt=[1, 2], max_new_tokens=6, diversity=0.0)["scores"]
    apart = run(traced, prompt=[1, 2], max_new_tokens=6, diversity=2.0)["scores"]
    assert (same[:2] == same[2:]).all() and (apart[:2] == same[:2]).all() and (apart[2:] != same[2:]).any()
