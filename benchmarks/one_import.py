"""Run one script on TRL and on this trainer, the import apart: the same numbers, seconds, memory and rewards.

    python benchmarks/one_import.py [--output docs/results/one_import.json] [--image docs/images/one_import.png]

The script is benchmarks/one_import_script.py.

The same numbers: the run here samples its completions. TRL's run gets the same ones through its rollout_func, prompt by
prompt. Model, rows, rewards, losses, steps and logs are each library's own. All keys that both log, apart from times,
and the weights at the end are compared.

Seconds, memory, rewards: each library samples for itself, in processes of their own, in turn, with several seeds. The
seconds are those of the fastest run. Needs: pip install -e ".[benchmark]"
"""

import contextlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from shared import character_tokenizer, random_qwen2, read_json, script_parser, write_json

from grpo.errors import ConfigError
from grpo.runtime.command import run_main

SCRIPT = Path(__file__).with_name("one_import_script.py")
CHARACTERS = "abcdefghij+="
SHAPE = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
CASES = [
    {"LOSS": loss, "ITERATIONS": iterations}
    for loss in ("dapo", "grpo", "dr_grpo", "sapo")  # bnpo depends on micro-batches in TRL
    for iterations in ("1", "2")
]
OTHER = ("step_time", "num_tokens", "total_flos", "learning_rate", "entropy", "kl", "completions/clipped_ratio")
"""Keys that are not compared: times. The learning rate, which TRL logs after the schedule's step. Entropy and KL, which
are means over tokens here, and means of micro-batch means in TRL. The share and the lengths of completions that ended:
TRL counts those whose last token is a drawn padding token."""
LIBRARIES = {"grpo": "this trainer", "trl": "TRL"}
SMOOTHING = 10
"""Steps of a running mean in the picture."""
FIRST_OR_LAST = ("grad_norm", "clip_ratio/region_mean")
"""Keys that are of another pass over the completions, where there are several: here of the first one or of all."""


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--output", help="file for the numbers (JSON)")
    parser.add_argument("--image", help="file for the picture of the rewards (PNG)")
    parser.add_argument("--steps", type=int, default=200, help="steps of the runs that sample for themselves; 0: none")
    parser.add_argument("--seeds", type=int, default=4, help="number of those runs of each library")
    parser.add_argument("--one", nargs=2, metavar=("LIBRARY", "FILE"), help="run the script once, in this process")
    options = parser.parse_args()
    if options.one:
        write_json(options.one[1], report_of(run_script(options.one[0], {})))
        return
    rows = [compare(case) for case in CASES]
    for row in rows:
        print(
            f"{row['loss_type']:8} x{row['iterations']}: {row['entries']} entries with {row['keys']} keys, largest "
            f"difference {row['largest']:.1e} ({row['key']}), of the weights {row['weights']:.1e}"
        )
    report: dict[str, Any] = {
        "command": "python benchmarks/one_import.py --output docs/results/one_import.json "
        "--image docs/images/one_import.png",
        "versions": {package: version(package) for package in ("torch", "transformers", "trl")},
        "rows": rows,
    }
    if options.steps:
        report |= beside(options.steps, options.seeds)
        for library, name in LIBRARIES.items():
            runs = report["runs"][library]
            rewards = ", ".join(f"{last_reward(run):.3f}" for run in runs)
            print(f"{name}: {fastest(runs)} s of train(), {runs[0]['peak_mib']} MiB; rewards at the end {rewards}")
        if options.image:
            draw(report, Path(options.image))
    if options.output:
        write_json(options.output, report)


def beside(steps: int, seeds: int) -> dict[str, Any]:
    """Run the script on both libraries, each sampling for itself: one run of each for every seed, in turn."""
    runs: dict[str, list[dict[str, Any]]] = {library: [] for library in LIBRARIES}
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder, "model"))
        for seed in range(seeds):
            for library in LIBRARIES:
                runs[library].append(run_alone(library, Path(folder), seed, steps))
    machine = {"cores": os.cpu_count(), "processor": platform.machine(), "threads": torch.get_num_threads()}
    return {"machine": machine, "steps": steps, "seeds": seeds, "runs": runs}


def fastest(runs: list[dict[str, Any]]) -> float:
    """Return the least seconds of train()."""
    return min(run["seconds"] for run in runs)


def last_reward(run: dict[str, Any]) -> float:
    """Return the mean reward of the last steps."""
    return fmean(value for _, value in run["rewards"][-SMOOTHING:])


def run_alone(library: str, folder: Path, seed: int, steps: int) -> dict[str, Any]:
    """Run the script once in a process of its own."""
    name = f"{library}-{seed}"
    environment = {"MODEL": str(folder / "model"), "OUT": str(folder / name), "STEPS": str(steps), "ITERATIONS": "1"}
    environment["SEED"] = str(seed)
    begun = time.perf_counter()
    command = [sys.executable, __file__, "--one", library, str(folder / f"{name}.json")]
    subprocess.run(command, env=os.environ | environment, check=True, capture_output=True)
    return read_json(folder / f"{name}.json") | {"process_seconds": round(time.perf_counter() - begun, 1)}


def report_of(trainer: Any) -> dict[str, Any]:
    """Return seconds of train(), peak memory of this process in MiB, and the reward of each step."""
    [seconds] = [entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry]
    # Not ru_maxrss, which a process takes over from the one that has started it.
    [kib] = [int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    rewards = [[entry["step"], round(entry["reward"], 4)] for entry in entries(trainer)]
    return {"seconds": round(seconds, 2), "peak_mib": round(kib / 1024), "rewards": rewards}


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the reward of both libraries by step, as a running mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.8), layout="constrained")
    axes = figure.subplots()
    for number, (library, name) in enumerate(LIBRARIES.items()):
        for run in report["runs"][library]:
            steps, values = zip(*run["rewards"], strict=True)
            means = [fmean(values[max(0, i + 1 - SMOOTHING) : i + 1]) for i in range(len(values))]
            label = f"{name}: {fastest(report['runs'][library]):.0f} s" if run is report["runs"][library][0] else None
            axes.plot(steps, means, color=f"C{number}", alpha=0.8, linewidth=1, label=label)
    axes.set_title(f"One script, the import apart: reward of each seed (mean of {SMOOTHING} steps)", fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=90, metadata={"Description": report["command"]})


def save_model(folder: Path) -> None:
    """Save a random model and its tokenizer."""
    tokenizer = character_tokenizer(CHARACTERS)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    random_qwen2(len(tokenizer), **SHAPE).save_pretrained(folder)


def compare(case: dict[str, str]) -> dict[str, Any]:
    """Return the largest differences of one case, relative to the larger of 1 and the value."""
    try:
        import trl
    except ImportError as error:
        raise ConfigError('this compares with TRL: pip install -e ".[benchmark]"') from error
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        save_model(model)
        environment = case | {"MODEL": str(model)}
        with recorded() as completions:
            ours = run_script("grpo", environment | {"OUT": f"{folder}/ours"})
        theirs = run_script("trl", environment | {"OUT": f"{folder}/theirs"}, replaying(trl.GRPOTrainer, completions))
    pairs = list(zip(entries(ours), entries(theirs), strict=True))
    differences: dict[str, float] = {}
    skipped = {*OTHER, *(FIRST_OR_LAST if case["ITERATIONS"] != "1" else ())}
    for mine, other in pairs:
        for key in (mine.keys() & other.keys()) - skipped:
            if "terminated" in key:
                continue
            distance = abs(mine[key] - other[key]) / max(1.0, abs(other[key]))
            differences[key] = max(differences.get(key, 0.0), distance)
    weights = max(
        float((a - b).detach().abs().max())
        for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
    )
    worst = max(differences, key=lambda key: differences[key])
    return {
        "loss_type": case["LOSS"],
        "iterations": int(case["ITERATIONS"]),
        "entries": len(pairs),
        "keys": len(differences),
        "key": worst,
        "largest": differences[worst],
        "loss": differences["loss"],
        "weights": weights,
        "differences": differences,
    }


def entries(trainer: Any) -> list[dict[str, float]]:
    """Return the entries of log_history that are of training steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def run_script(library: str, environment: dict[str, str], trainer: Any = None) -> Any:
    """Run the script with `library` in its import line, and return its trainer."""
    source = SCRIPT.read_text(encoding="utf-8")
    changed = source.replace("from trl import", f"from {library} import")
    assert library == "trl" or changed != source
    os.environ |= environment
    names: dict[str, Any] = {"__name__": "__main__", "__file__": str(SCRIPT)}
    with contextlib.ExitStack() as stack:
        if trainer is not None:
            stack.enter_context(mock.patch("trl.GRPOTrainer", trainer))
        exec(compile(changed, str(SCRIPT), "exec"), names)
    return names["trainer"]


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, list[Any]]]:
    """Record within what the native engine samples: text of a prompt -> its groups, one after the other."""
    from grpo.rollout.native_engine import NativeEngine

    found: dict[str, list[Any]] = {}
    generate = NativeEngine.generate

    def record(self: Any, prompts: Any, plan: Any, finished: Any = None) -> Any:
        groups = generate(self, prompts, plan, finished)
        for group in groups:
            found.setdefault(str(group.prompt.messages), []).append(group)
        return groups

    NativeEngine.generate = record  # type: ignore[method-assign]
    try:
        yield found
    finally:
        NativeEngine.generate = generate  # type: ignore[method-assign]


def replaying(trainer: Any, completions: dict[str, list[Any]]) -> Any:
    """Return a class of TRL's trainer that takes these completions instead of sampling its own."""
    left: dict[str, list[Any]] = {
        prompt: [(group.prompt, completion) for group in groups for completion in group.completions]
        for prompt, groups in completions.items()
    }

    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        taken = [left[prompt].pop(0) for prompt in prompts]
        return {
            "prompt_ids": [list(prompt.token_ids) for prompt, _ in taken],
            "completion_ids": [completion.token_ids for _, completion in taken],
            "logprobs": None,
        }

    class Replaying(trainer):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **given: Any) -> None:
            super().__init__(*arguments, rollout_func=rollouts, **given)

    return Replaying


if __name__ == "__main__":
    run_main(main)
