"""One line about a measured loss."""

from __future__ import annotations

from collections.abc import Mapping


def quality(loss: Mapping[str, object] | None) -> str:
    """The losses of a pass in words; "not measured" when there are none."""
    if not loss:
        return "not measured"

    def number(key: str) -> float:
        value = loss[key]
        return float(value) if isinstance(value, (int, float)) else float("nan")

    if loss.get("kl") is None:
        return f"relative error {number('error'):.2e}"
    first = loss.get("first_divergence")
    return (
        f"KL {number('kl'):.4f} nats/token, top-1 equal {number('top1'):.1%}, "
        f"perplexity {number('perplexity_before'):.3f} -> {number('perplexity_after'):.3f}, "
        + ("no differing token" if first is None else f"first differing token at {first}")
        + f" ({int(number('tokens'))} tokens)"
    )
