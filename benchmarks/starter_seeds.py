"""Draw README's first picture from docs/results/starter_seeds.json.    python benchmarks/starter_seeds.py"""

import json
from pathlib import Path

from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"
PANELS = {"held-out accuracy": "accuracy_by_step", "tokens of an answer": "length_by_step"}

runs = json.loads((DOCS / "results" / "starter_seeds.json").read_text())["runs"]
figure = Figure(figsize=(9, 2.8), layout="constrained")
for axes, (title, key) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
    for run in runs:
        axes.plot([int(step) for step in run[key]], list(run[key].values()), marker="o", label=f"seed {run['seed']}")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
figure.savefig(DOCS / "images" / "starter_seeds.png", dpi=90)
