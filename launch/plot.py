"""Draw the loss of a run over its legs, with each kill and each resume marked.

    .venv/bin/python launch/plot.py loss.png leg-1.jsonl leg-2.jsonl

Each file is one leg: what `launch/train.py --log-file` wrote between a start and its end or its death.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Leg:
    """One process group's life: the steps that it took, with their losses."""

    steps: list[int]
    losses: list[float]
    world_size: int


def read_leg(path: Path) -> Leg:
    """The leg in a log file. A last line that the kill cut short is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines[:-1]]
    if not rows:
        raise SystemExit(f"{path} holds no complete step yet.")
    return Leg([row["step"] for row in rows], [row["loss"] for row in rows], rows[0]["world_size"])


def draw(legs: list[Leg], target: Path) -> None:
    """Write the picture. Steps that a later leg took again are faded: they were lost with their process."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 5.5), layout="constrained")
    top = max(max(leg.losses) for leg in legs)
    for number, leg in enumerate(legs):
        following = legs[number + 1] if number + 1 < len(legs) else None
        kept = sum(following is None or step < following.steps[0] for step in leg.steps)
        colour = f"C{number}"
        ranks = f"{leg.world_size} rank{'s' if leg.world_size > 1 else ''}"
        axes.plot(leg.steps[:kept], leg.losses[:kept], color=colour, label=f"leg {number + 1}: {ranks}", zorder=3)
        if following is None:
            continue
        resumed_at, killed_at = following.steps[0] - 1, leg.steps[-1]
        axes.plot(
            leg.steps[max(0, kept - 1) :],
            leg.losses[max(0, kept - 1) :],
            color=colour,
            alpha=0.35,
            linewidth=6,
            label=f"lost in the kill, then trained again: steps {resumed_at + 1} to {killed_at}",
        )
        axes.plot(
            killed_at, leg.losses[-1], "X", color="crimson", markersize=11, zorder=4, label="SIGKILL during a save"
        )
        axes.axvline(resumed_at, color="black", linestyle="--", linewidth=1)
        on = f"{following.world_size} rank{'s' if following.world_size > 1 else ''}"
        axes.annotate(
            f"resumed from step {resumed_at}\non {on}", (resumed_at, top), (6, -4), textcoords="offset points", va="top"
        )
    axes.set(xlabel="optimizer step", ylabel="training loss (nats per byte)", title="The loss across a kill")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    figure.savefig(target, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    draw([read_leg(Path(name)) for name in sys.argv[2:]], Path(sys.argv[1]))
    print(f"The picture is {sys.argv[1]}.")
