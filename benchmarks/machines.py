"""Try every accelerate config on this machine, full and LoRA: docs/results/machines.json and docs/machines.md.

    python benchmarks/machines.py [--only PROFILE ...] [--output docs/results/machines.json]
    python benchmarks/machines.py --table             write docs/machines.md from the JSON files, run nothing

Each try is two steps of launch/train.py with a random model. Without a GPU, several processes communicate over gloo,
and the table shows the flags that this needs. Float32 runs are compared with one process without a launcher.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from memory import save_models
from shared import (
    BY_LENGTH,
    DOCS,
    RESULTS,
    ROOT,
    launch_training,
    markdown,
    read_json,
    script_parser,
    write_additions,
    write_json,
)

from grpo.models.strategies.registry import machine_of
from grpo.runtime.command import run_main

TWO = ["--num_processes", "2"]
FLOAT32 = ["--mixed_precision", "no"]
TRIES: dict[str, list[list[str]]] = {  # accelerate config -> the launcher flags of each try
    "cpu": [[]],
    "cpu_2proc": [[]],
    "single_gpu": [[]],
    "single_gpu_fp16": [[]],
    "multi_gpu": [TWO],
    "fsdp2": [TWO + FLOAT32, TWO],
    "deepspeed_zero2": [TWO + FLOAT32, TWO],
    "deepspeed_zero3": [TWO + FLOAT32, TWO],
    "multi_node_fsdp2": [["--num_machines", "2", *TWO, *FLOAT32]],
    "mps": [[]],
    "one_process": [[]],
}
WAYS = {"full": {}, "LoRA": {"lora.r": "4"}}
DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


STEP = {
    "prompts_per_step": "3",
    "sampling.num_generations": "4",
    "optimizer.learning_rate": "0.001",
}


def main() -> None:
    """Run the tries and write the page."""
    parser = script_parser(__doc__)
    parser.add_argument("--only", nargs="*", choices=list(TRIES), help="these profiles only")
    parser.add_argument("--table", action="store_true", help="only write docs/machines.md")
    parser.add_argument("--output", type=Path, default=RESULTS / "machines.json")
    options = parser.parse_args()
    if not options.table:
        rows = try_all(options.only or list(TRIES))
        if options.only and options.output.is_file():
            kept = read_json(options.output)["rows"]
            rows = [row for row in kept if row["profile"] not in options.only] + rows
            rows.sort(key=lambda row: list(TRIES).index(row["profile"]))
        report = {"command": "python benchmarks/machines.py", "machine": machine(), "rows": rows}
        write_json(options.output, report)
    path = DOCS / "machines.md"
    path.write_text(page(options.output.parent), encoding="utf-8")
    print(path)


def machine() -> str:
    """Describe this machine."""
    import torch

    gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} CPU cores, {gpus}, torch {torch.__version__}"


def try_all(names: list[str]) -> list[dict[str, Any]]:
    """Try the profiles `names`, full and LoRA. Return one row of the table for each try."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_models(folder)
        write_additions(folder, BY_LENGTH)
        for way, changes in WAYS.items():
            start(folder, f"plain {way}", [sys.executable], changes)
            for name in names:
                for flags in TRIES[name]:
                    launch = ["--config_file", f"accelerate_configs/{name}.yaml", *flags]
                    settings = [f"--{key} {value}" for key, value in changes.items()]
                    command = " ".join(["accelerate launch", *launch, "launch/train.py", *settings])
                    row = {"profile": name, "way": way, "command": command}
                    rows.append(row | attempt(folder, f"{name} {way} {len(rows)}", way, launch, changes))
                    print(json.dumps(rows[-1]), flush=True)
    return sorted(rows, key=lambda row: list(TRIES).index(row["profile"]))


def attempt(folder: Path, run: str, way: str, launch: list[str], changes: dict[str, str]) -> dict[str, Any]:
    """Run one try. Return its result and the numbers behind it."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", *launch]
    if "--num_machines" in launch:  # two launchers stand for two machines
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        address = ["--main_process_ip", "127.0.0.1", "--main_process_port", port, "--machine_rank"]
        with ThreadPoolExecutor() as hosts:
            tries = [hosts.submit(start, folder, run, [*accelerate, *address, rank], changes) for rank in "01"]
            done = [one.result() for one in tries][0]
    else:
        done = start(folder, run, accelerate, changes)
    if not (folder / run / "final").is_dir():
        said = [line for line in done.stderr.splitlines() if "error:" in line.lower() or "Error: " in line]
        return {"result": "refused", "message": said[0].strip() if said else done.stderr[-300:]}
    described = re.search(r"\d+ process(?:\(es\)|es)? on .*", done.stdout + done.stderr)
    metrics = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    found = {
        "result": "ran here",
        "how": described[0].strip() if described else "",
        "sampling_logprob_difference": max(row["policy/sampling_logprob_difference"] for row in metrics),
    }
    if precision_of(launch) == "no":
        found["largest_weight_difference_to_one_process"] = difference(folder / f"plain {way}", folder / run)
    return found


def precision_of(launch: list[str]) -> str:
    """Return the mixed precision of a try: its flag, or the accelerate config's."""
    if "--mixed_precision" in launch:
        return launch[launch.index("--mixed_precision") + 1]
    return machine_of(str(ROOT / launch[launch.index("--config_file") + 1])).precision


def difference(first: Path, second: Path) -> float:
    """Return the largest difference between the weights of two runs."""
    from safetensors.torch import load_file

    one, other = (load_file(run / "final" / "model.safetensors") for run in (first, second))
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def start(folder: Path, run: str, launcher: list[str], changes: dict[str, str]) -> subprocess.CompletedProcess:
    """Run launch/train.py with the tiny model in the run directory `folder`/`run`."""
    return launch_training(launcher, folder, folder / run, STEP | {"model.name": str(folder / "tiny")} | changes)


def page(results: Path) -> str:
    """Return the text of docs/machines.md from the results folder."""
    tried, measured, fits = (
        read_json(path) if path.is_file() else None
        for path in (results / f"{name}.json" for name in ("machines", "memory", "memory_fits"))
    )
    lines = [
        "# Machines",
        "",
        "Generated by `python benchmarks/machines.py --table` from `docs/results/`. Do not edit.",
        "",
    ]
    if tried:
        lines += [
            f"## Profiles: {tried['machine']}",
            "",
            "Two steps with a random model for each profile. The result shows the largest difference of a weight "
            "from a run with one process (float32 only), and the largest mean difference between sampling and "
            "training logprobs.",
            "",
            "| profile | | result | command |",
            "|---|---|---|---|",
        ]
        lines += [f"| {row['profile']} | {row['way']} | {outcome(row)} | `{row['command']}` |" for row in tried["rows"]]
        lines += [
            "",
            "On a machine without a GPU, profiles for GPUs run on the CPU over gloo. This tests the code path and not "
            "the speed. GPUs: not measured. The two DeepSpeed profiles need `pip install deepspeed==0.19.8` "
            "(`DS_BUILD_OPS=0` without a compiler).",
        ]
    if measured:
        lines += [
            "",
            "## Memory, measured on a CPU",
            "",
            f"`{measured['command']}`; {measured['model']}. {measured['how']}.",
            "",
        ]
        lines += ["| run | estimate MiB | measured MiB | estimate / measured |", "|---|---|---|---|"]
        for row in measured["rows"]:
            cells = (row["estimate_mib"], row["measured_mib"], row["estimate_over_measured"])
            lines.append(f"| {row['case']} | " + " | ".join(map(str, cells)) + " |")
        lines += [
            "",
            "Step times are in [scaling.md](scaling.md). The runs above return freed memory to the system at once, "
            "which takes time.",
        ]
    if fits:
        where = list(fits["rows"][0]["gib_per_gpu"])
        lines += ["", "## Memory, computed", "", f"`{fits['command']}`: {fits['what']}. {fits['settings']}.", ""]
        lines += ["| model | | " + " | ".join(where) + " |", "|---|---|" + "---|" * len(where)]
        for row in fits["rows"]:
            lines.append(
                f"| {row['model']} | {row['way']} | "
                + " | ".join(str(row["gib_per_gpu"][name]) for name in where)
                + " |"
            )
    return markdown(lines)


def outcome(row: dict[str, Any]) -> str:
    """Return the result of a try in words."""
    if row["result"] == "refused":
        return f"refused: {row['message']}".replace("|", "/")
    far = row.get("largest_weight_difference_to_one_process")
    same = "weights not compared" if far is None else f"weights within {far:.1g} of one process"
    return f"ran: {setup(row['how'])}; {same}; logprob difference {row['sampling_logprob_difference']:.1g}"


def setup(how: str) -> str:
    """Describe the processes of a run.

    # 2 process(es) on cpu:0 (FSDP), no precision  ->  2 processes on CPU (FSDP), float32
    """
    found = re.match(r"(\d+) process\S* on ([a-z]+)\S* \((\w+)\), (\w+) precision", how)
    if found is None:
        return how
    count, device, strategy, precision = found.groups()
    processes = f"{count} process{'es' if count != '1' else ''} on {device.upper()}"
    return f"{processes}{'' if strategy == 'NO' else f' ({strategy})'}, {DTYPES.get(precision, precision)}"


if __name__ == "__main__":
    run_main(main)
