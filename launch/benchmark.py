"""Benchmark: this trainer and TRL on the same work, in alternating processes -> one table and one JSON file.

python launch/benchmark.py --suite cpu-tiny [--output FILE.json] [--profile FILE.txt]
python launch/benchmark.py --suite cpu-gsm8k --data.path train.jsonl [--output FILE.json]
python launch/benchmark.py --suite cpu-135m --data.path train.jsonl --precision bf16 --busy 1
python launch/benchmark.py --suite cpu-gsm8k --data.path train.jsonl --decode    milliseconds per token of our engine
python launch/benchmark.py --readme docs/results/cpu-*.json                      the table of README.md

Both trainers get the same model folder, prompts in the same order, reward functions, group size, optimizer and
precision. They also get the same completion lengths. Untrained models do not end their completions, and runs with
different lengths cannot be compared. So each completion ends at a length drawn beforehand: log-normal with the
suite's mean, the longest at the limit. TRL runs twice: with its defaults (micro-batches of 8, gradient
checkpointing), and tuned (no checkpointing, no dropout, steps_per_generation equal to accumulation, so that no
old-logprob pass runs). Ratios are TRL divided by ours: above 1, ours is better. Needs: pip install -e ".[benchmark]"
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks")]

from against_trl.measuring import busy_processes, count_cpu_time, machine_rates, profiled  # noqa: E402
from against_trl.ours import decode_times, run_ours  # noqa: E402
from against_trl.report import readme_table, summarize, table  # noqa: E402
from against_trl.suites import RUNNERS, SUITES, Suite, chosen_suite, make_work  # noqa: E402
from against_trl.theirs import run_trl  # noqa: E402

from grpo.errors import ConfigError  # noqa: E402
from grpo.runtime.command import run_main  # noqa: E402


def parsed_flags() -> argparse.Namespace:
    """Return the flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES)
    parser.add_argument(
        "--data.path", dest="data_path", help="GSM8K training rows (JSONL), for the gsm8k and gpu suites"
    )
    parser.add_argument("--output", help="write the JSON here")
    parser.add_argument("--profile", help="then write a profile of our trainer and of TRL tuned here")
    parser.add_argument("--steps", type=int, help="measured steps of each run, instead of the suite's")
    parser.add_argument("--rounds", type=int, help="runs of each trainer, instead of the suite's")
    parser.add_argument(
        "--dry_run", action="store_true", help="only test that the suite runs, with a narrow model on the CPU"
    )
    parser.add_argument(
        "--precision", choices=["no", "bf16"], help="mixed precision of both trainers, instead of the suite's"
    )
    parser.add_argument(
        "--busy", type=int, default=0, metavar="N", help="run N processes meanwhile that keep one core busy each"
    )
    parser.add_argument(
        "--runners", nargs="+", choices=RUNNERS, default=RUNNERS, help="measure only these (ours and trl_tuned, or one)"
    )
    parser.add_argument("--decode", action="store_true", help="only time our engine: milliseconds per token, by rows")
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="CPU suites on a shared machine: one thread each, CPU seconds instead of wall-clock seconds",
    )
    parser.add_argument(
        "--readme", nargs="+", metavar="JSON", help="print the README's table of these results, and stop"
    )
    parser.add_argument("--worker", choices=RUNNERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the benchmark, or one worker of it."""
    flags = parsed_flags()
    if flags.readme:
        print(readme_table([json.loads(Path(path).read_text()) for path in flags.readme]))
        return
    if not flags.suite:
        raise ConfigError(f"--suite is missing: one of {', '.join(SUITES)}")
    suite = chosen_suite(flags)
    if flags.worker:
        if flags.cpu_time:
            count_cpu_time()
        with profiled(suite, flags.profile, flags.worker):
            result = (run_ours if flags.worker == "ours" else run_trl)(suite, Path(flags.folder), flags.worker)
        (Path(flags.folder) / "result.json").write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_work(suite, folder, flags.data_path)
        if flags.decode:
            print(decode_times(suite, folder))
            return
        measured = [machine_rates(suite, one_thread=flags.cpu_time)]
        runs: dict[str, list[dict]] = {name: [] for name in flags.runners}
        for number in range(suite.rounds):
            for name in runs:
                print(f"round {number + 1} of {suite.rounds}: {name}", file=sys.stderr, flush=True)
                with busy_processes(flags.busy):
                    runs[name].append(worker(flags, suite, name, folder))
            measured.append(machine_rates(suite, one_thread=flags.cpu_time))
        # The best of several times, because a cloud machine is slow at times.
        rates = {name: max(rates[name] for rates in measured) for name in measured[0]}
        report = summarize(flags, suite, runs, rates)
        if flags.profile:
            Path(flags.profile).parent.mkdir(parents=True, exist_ok=True)
            Path(flags.profile).write_text(table(report) + "\n")
            for name in [name for name in runs if name != "trl_default"]:
                worker(flags, replace(suite, steps=1), name, folder, profile=True)
    print(table(report))
    if flags.output:
        Path(flags.output).parent.mkdir(parents=True, exist_ok=True)
        Path(flags.output).write_text(json.dumps(report, indent=1) + "\n")


def worker(flags: argparse.Namespace, suite: Suite, name: str, folder: Path, profile: bool = False) -> dict:
    """Run one trainer in a new process. Return its result.

    Raises:
        ConfigError: if the process fails.
    """
    words = [sys.executable, __file__, "--suite", flags.suite, "--worker", name, "--folder", str(folder)]
    words += ["--steps", str(suite.steps), "--rounds", "1", *(["--dry_run"] if flags.dry_run else [])]
    words += ["--cpu_time"] if flags.cpu_time else []
    words += ["--precision", suite.precision]
    words += ["--profile", flags.profile] if profile else []
    # Accelerate reads these variables, so that precision and device are the same for both trainers.
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": suite.precision}
    environment |= {"ACCELERATE_USE_CPU": "true"} if suite.device == "cpu" else {}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ConfigError(f"the benchmark of {name} failed:\n{done.stderr[-2000:]}")
    return json.loads((folder / "result.json").read_text())


if __name__ == "__main__":
    run_main(main)
