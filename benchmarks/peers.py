"""Speed of a model in a runtime that has an interpreter of its own, as `llama-bench -o json` would print it.

    PYTHON benchmarks/peers.py openvino FOLDER [DYNAMIC_QUANTIZATION_GROUP_SIZE=128 ...]
    PYTHON benchmarks/peers.py onnxruntime FOLDER

FOLDER: what `optimum-cli export openvino` or `python -m onnxruntime_genai.models.builder` wrote. Imports nothing of Stemma, whose
packages that interpreter need not have. Each measurement comes after a warm-up of its own kind; no two have a prefix in common.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

# From the ids of a prompt and the number of new tokens: seconds to the first token, and from there to the last.
Generate = Callable[[list[int], int], tuple[float, float]]


def openvino(folder: Path, threads: int, properties: dict[str, str]) -> Generate:
    """OpenVINO GenAI on the CPU, with properties of its plugin."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    pipeline = genai.LLMPipeline(str(folder), "CPU", INFERENCE_NUM_THREADS=threads, **properties)

    def generate(prompt: list[int], new: int) -> tuple[float, float]:
        config = genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False, apply_chat_template=False)
        metrics = pipeline.generate(ov.Tensor(np.array([prompt], dtype=np.int64)), config).perf_metrics
        first = metrics.get_ttft().mean / 1e3
        return first, metrics.get_generate_duration().mean / 1e3 - first

    return generate


def onnxruntime(folder: Path, threads: int, properties: dict[str, str]) -> Generate:
    """ONNX Runtime GenAI on the CPU, with options of its session."""
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    options = {"intra_op_num_threads": threads, **properties}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = genai.Model(config)

    def generate(prompt: list[int], new: int) -> tuple[float, float]:
        length = len(prompt) + new
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(min_length=length, max_length=length, do_sample=False)
        generator = genai.Generator(model, parameters)
        start = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new - 1):
            generator.generate_next_token()
        return first - start, time.perf_counter() - first

    return generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtime", choices=("openvino", "onnxruntime"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("properties", nargs="*", metavar="NAME=VALUE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    a = parser.parse_args()
    load = {"openvino": openvino, "onnxruntime": onnxruntime}[a.runtime]
    generate = load(a.folder, a.threads, dict(p.split("=", 1) for p in a.properties))
    prompts = [list(range(start, start + a.prompt)) for start in (1000, 3000)]
    generate(prompts[0], 1)
    prefill = generate(prompts[1], 1)[0]
    generate([5000], a.new + 1)
    decode = generate([6000], a.new + 1)[1]
    tests = ({"n_prompt": a.prompt, "avg_ts": a.prompt / prefill}, {"n_prompt": 0, "avg_ts": a.new / decode})
    json.dump(tests, sys.stdout)


if __name__ == "__main__":
    main()
