"""Measure the cost of a large data file: generated, with faulty rows, read by the code that training uses.

    python benchmarks/large_data.py [--rows 85000] [--faulty 0.005] [--resume_at 60000] [--output FILE.json]

Each figure is measured in a new process, imports included: first start (validate, tokenise, write the Arrow file),
second start (reuse it), the prompts after row 60,000 (equal to those of an uninterrupted run), and the same for
streaming.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shared import script_parser, write_json

from grpo.runtime.command import run_main

STEP = 8
"""Prompts per step."""


def main() -> None:
    """Measure, and print the report."""
    parser = script_parser(__doc__)
    parser.add_argument("--rows", type=int, default=85_000)
    parser.add_argument("--faulty", type=float, default=0.005, help="fraction of unusable rows")
    parser.add_argument("--resume_at", type=int, default=60_000, help="prompts drawn before the stop")
    parser.add_argument("--output", help="write the figures to this JSON file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, Path(options.folder), options.resume_at)))
        return
    with tempfile.TemporaryDirectory() as folder:
        faulty = make_files(Path(folder), options.rows, options.faulty)
        size = (Path(folder) / "rows.jsonl").stat().st_size
        figures = {name: measure(name, folder, options.resume_at) for name in ("first", "second", "resumed", "whole")}
        figures |= {name: measure(name, folder, options.resume_at) for name in ("stream_whole", "stream_resumed")}
    report = {
        "rows": options.rows,
        "faulty": faulty,
        "file_mb": round(size / 1e6, 1),
        "cores": os.cpu_count(),
        "first_start_s": figures["first"]["seconds"],
        "first_start_rss_gb": figures["first"]["rss_gb"],
        "used": figures["first"]["prompts"],
        "rejected": figures["first"]["rejected"],
        "second_start_s": figures["second"]["seconds"],
        "second_start_rss_gb": figures["second"]["rss_gb"],
        "resume_at": options.resume_at,
        "resumed_equals_whole": figures["resumed"]["drawn"] == figures["whole"]["drawn"],
        "stream_first_prompt_s": figures["stream_whole"]["seconds"],
        "stream_resume_s": figures["stream_resumed"]["seconds"],
        "stream_rss_gb": figures["stream_resumed"]["rss_gb"],
        "stream_resumed_equals_whole": figures["stream_resumed"]["drawn"] == figures["stream_whole"]["drawn"],
    }
    assert report["rejected"] == faulty and report["used"] == options.rows - faulty
    print(json.dumps(report, indent=1))
    if options.output:
        write_json(options.output, report)


def make_files(folder: Path, rows: int, share: float) -> int:
    """Write rows.jsonl, and a model folder with a tokenizer made from its text. Return the number of faulty rows."""
    from grpo.data.invented_language import generate_rows
    from grpo.models.tiny import make_tokenizer

    chance = random.Random(0)
    made = generate_rows(rows, seed=0)
    make_tokenizer([text for row in made[:5000] for text in (row["question"], row["answer"])], 2000).save_pretrained(
        folder / "model"
    )
    (folder / "model" / "config.json").write_text('{"model_type": "qwen2"}')
    faults = set(chance.sample(range(rows), round(share * rows)))
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number, row in enumerate(made):
            line = json.dumps(row, ensure_ascii=False)
            if number in faults:
                broken = [line[: len(line) // 2], line.replace('"answer"', '"reply"'), line.replace("`", ""), "[1, 2]"]
                broken.append(json.dumps(row | {"question": None}))
                line = broken[number % len(broken)]
            file.write(line + "\n")
    return len(faults)


def measure(name: str, folder: str, resume_at: int) -> dict[str, Any]:
    """Run one child process. Return its figures; "seconds" count from its start to the first prompt."""
    command = [sys.executable, __file__, "--child", name, "--folder", folder, "--resume_at", str(resume_at)]
    environment = os.environ | {"GRPO_CACHE": f"{folder}/cache", "STARTED": str(time.time())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def child(name: str, folder: Path, resume_at: int) -> dict[str, Any]:
    """Load the data as training does, take prompts, and return the figures."""
    from accelerate import Accelerator

    from grpo.config.schema import Config
    from grpo.data.streaming import StreamedPrompts
    from grpo.data.training_data import training_data
    from grpo.rewards.scoring import RewardSum

    config = Config(rewards={"term_match": 0.6, "chrf": 0.4})
    config.model.name = str(folder / "model")
    config.data.name, config.data.path = "question_answer", str(folder / "rows.jsonl")
    config.data.extractor, config.data.system_prompt, config.data.bad_rows = "quoted_terms", None, "skip"
    config.data.streaming = name.startswith("stream")
    data = training_data(config, Accelerator(cpu=True), RewardSum(config.rewards), lambda *_: str(folder / "model"))
    stream, first = data.stream, resume_at // STEP
    state = folder / "stream.json"
    if name == "stream_resumed":
        stream.load_state_dict(json.loads(state.read_text()))
        drawn = stream.take(first, STEP)
    else:
        drawn = stream.take(first if name == "resumed" else 0, STEP)
    seconds = time.time() - float(os.environ["STARTED"])
    if name in ("whole", "stream_whole"):  # not interrupted: every step up to there is taken
        for step in range(1, first):
            stream.take(step, STEP)
        if isinstance(stream, StreamedPrompts):
            state.write_text(json.dumps(stream.state_dict()))
        drawn = stream.take(first, STEP)
    drawn += (
        [prompt for step in range(first + 1, first + 50) for prompt in stream.take(step, STEP)]
        if name not in ("first", "second")
        else []
    )
    import resource

    return {
        "seconds": round(seconds, 1),
        "rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "prompts": data.size,
        "rejected": len(data.rejected),
        "drawn": hashlib.sha256(repr([(p.draw, p.token_ids, p.columns) for p in drawn]).encode()).hexdigest(),
    }


if __name__ == "__main__":
    run_main(main)
