"""Make a checkpoint larger without changing what it computes: `python -m benchmarks.grow FOLDER OUTPUT --megabytes 400`.

For measurements only: the model keeps its behaviour, while its steps cost what those of a model of that size cost. Every MLP gets
more neurons, copies of its own with zero columns in the down projection; then layers are added that are copies of the last one
with zero output projections, so that they add nothing. A copied neuron has the value of its original: what rounds by the largest
value of a row rounds as before.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

NEURONS = 16384


def grow(folder: Path, output: Path, megabytes: float) -> int:
    """Writes a checkpoint whose layers have `megabytes` of weights or more, at a byte each; how many layers there are."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    own, layers = config["intermediate_size"], config["num_hidden_layers"]
    rows = torch.arange(NEURONS) % own
    for i in range(layers):
        for name in ("gate_proj", "up_proj"):
            key = f"model.layers.{i}.mlp.{name}.weight"
            weights[key] = weights[key][rows].contiguous()
        key = f"model.layers.{i}.mlp.down_proj.weight"
        wide = torch.zeros(weights[key].shape[0], NEURONS, dtype=weights[key].dtype)
        wide[:, :own] = weights[key]
        weights[key] = wide
    last = {k: v for k, v in weights.items() if k.startswith(f"model.layers.{layers - 1}.")}
    each = sum(v.numel() for v in last.values())
    count = max(layers, -int(-megabytes * 1e6 // each))
    for i in range(layers, count):
        for key, value in last.items():
            silent = key.endswith(("o_proj.weight", "down_proj.weight"))
            made = torch.zeros_like(value) if silent else value.clone()
            weights[key.replace(f".{layers - 1}.", f".{i}.")] = made
    output.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.json"):
        shutil.copy(path, output / path.name)
    config |= {"intermediate_size": NEURONS, "num_hidden_layers": count}
    (output / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, output / "model.safetensors", {"format": "pt"})
    return int(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--megabytes", type=float, default=400)
    given = parser.parse_args()
    print(f"{grow(given.folder, given.output, given.megabytes)} layers of {NEURONS} neurons in {given.output}")


if __name__ == "__main__":
    main()
