"""Draw README's first picture from docs/results/starter_seeds.json.

python benchmarks/starter_seeds.py
"""

from matplotlib.figure import Figure
from shared import DOCS, RESULTS, read_json, script_parser

from grpo.runtime.command import run_main

PANELS = {"held-out accuracy": "accuracy_by_step", "tokens of an answer": "length_by_step"}


def main() -> None:
    """Write docs/images/starter_seeds.png."""
    script_parser(__doc__).parse_args()
    runs = read_json(RESULTS / "starter_seeds.json")["runs"]
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    for axes, (title, key) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for run in runs:
            steps, values = [int(step) for step in run[key]], list(run[key].values())
            axes.plot(steps, values, marker="o", label=f"seed {run['seed']}")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    path = DOCS / "images" / "starter_seeds.png"
    figure.savefig(path, dpi=90)
    print(path)


if __name__ == "__main__":
    run_main(main)
