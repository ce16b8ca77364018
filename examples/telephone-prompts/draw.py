"""Draws the README's two pictures from what a demo run recorded: weights over time, and word error rate by step.

python examples/telephone-prompts/draw.py [RECORD] [FOLDER]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

REPOSITORY = Path(__file__).resolve().parents[2]
STABLE, CANARY = "#4c6a92", "#c0622d"
DIFFERENCE_SHOWN = 45  # points; the first bounds are wider than any scale would bear

Samples = list[dict[str, Any]]


def draw_weights(rollouts: dict[str, Samples], target: Path) -> None:
    """Draws the canary's weight over time, one panel for each rollout."""
    figure, axes = plt.subplots(1, len(rollouts), figsize=(9, 3), sharey=True, layout="constrained")
    for axis, (title, samples) in zip(axes, rollouts.items(), strict=True):
        seconds = [each["seconds"] for each in samples]
        weights = [each["weight"] for each in samples]
        axis.step(seconds, weights, where="post", color=CANARY)
        axis.fill_between(seconds, weights, step="post", alpha=0.2, color=CANARY)
        axis.set(title=title, xlabel="seconds since spec.model was changed", ylim=(-3, 105))
    axes[0].set_ylabel("canary's share of requests, %")
    figure.savefig(target, dpi=120)
    plt.close(figure)


def draw_word_errors(rollouts: dict[str, Samples], target: Path) -> None:
    """Draws both arms' WER, and the bounds of the difference, over the utterances that both have heard."""
    figure, axes = plt.subplots(2, len(rollouts), figsize=(9, 5), sharex="col", sharey="row", layout="constrained")
    for column, (title, samples) in enumerate(rollouts.items()):
        known = [each for each in samples if each["analysis"] and each["analysis"].get("low") is not None]
        seen = {each["analysis"]["utterances"]: each["analysis"] for each in known}
        order = sorted(seen)
        upper, lower = axes[0][column], axes[1][column]
        for key, label, colour in (("stableWer", "stable", STABLE), ("canaryWer", "canary", CANARY)):
            upper.plot(order, [100 * float(seen[n][key]) for n in order], label=label, color=colour, marker=".")
        # Each step is named where the first figures of its time are.
        steps = {each["weight"]: each["analysis"] for each in reversed(known) if each["weight"]}
        for weight, analysis in steps.items():
            place = (analysis["utterances"], 100 * float(analysis["canaryWer"]))
            upper.annotate(f"{weight} %", place, xytext=(0, -12), textcoords="offset points", ha="center", fontsize=8)
        upper.set(title=title)
        upper.margins(y=0.2)
        upper.legend()
        low = [100 * float(seen[n]["low"]) for n in order]
        high = [100 * float(seen[n]["high"]) for n in order]
        lower.fill_between(order, low, high, alpha=0.25, color=CANARY)
        lower.plot(order, [100 * float(seen[n]["difference"]) for n in order], color=CANARY, marker=".")
        lower.axhline(0, color="black", linewidth=0.8)
        lower.set(xlabel="utterances that both arms have heard", ylim=(-DIFFERENCE_SHOWN, DIFFERENCE_SHOWN))
    axes[0][0].set_ylabel("word error rate, %")
    axes[1][0].set_ylabel("difference, points")
    figure.savefig(target, dpi=120)
    plt.close(figure)


def main() -> None:
    """Draws both."""
    record = Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / ".state" / "demo.json"
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else REPOSITORY / "docs" / "images"  # noqa: PLR2004
    rollouts: dict[str, Samples] = json.loads(record.read_text())["rollouts"]
    folder.mkdir(parents=True, exist_ok=True)
    draw_weights(rollouts, folder / "weights.png")
    draw_word_errors(rollouts, folder / "word-errors.png")
    print(f"wrote {folder / 'weights.png'} and {folder / 'word-errors.png'}")


if __name__ == "__main__":
    main()
