"""Prose end to end: 300 rows of an invented language, from a file to a significant held-out gain."""

import json
from pathlib import Path

import pytest

from grpo.config.parser import load_config
from grpo.data.invented_language import generate_rows, make_lexicon
from grpo.models.tiny import ProseRecipe, make_tiny_model
from grpo.runtime.statistics import mcnemar
from grpo.tracking.report import paired_items
from grpo.tracking.run_reader import RunFolder
from grpo.trainer import train


@pytest.mark.slow
def test_three_hundred_rows_to_an_established_gain(tmp_path: Path) -> None:
    lexicon = make_lexicon(0, nouns=17)
    parts = {"train": generate_rows(300, lexicon=lexicon), "held_out": generate_rows(lexicon=lexicon, split="held_out")}
    for name, rows in parts.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    recipe = ProseRecipe(vocabulary=450, steps=240, batch=32, unmarked_fraction=0.75)
    model = make_tiny_model(seed=0, problems=parts["train"], cache=tmp_path / "cache", recipe=recipe)
    flags = {
        "config": "launch/configs/invented_language.yaml",
        "model.name": model,
        "data.name": "question_answer",
        "data.path": tmp_path / "train.jsonl",
        "data.eval_path": tmp_path / "held_out.jsonl",
        "steps": 16,
        "eval_every": 16,
        "save_every": 0,
        "tokens_per_batch": 8192,
        "scoring.workers": 0,
        "tracking.report_to": "[]",
        "run_dir": tmp_path / "run",
    }
    run = RunFolder(train(load_config([f"--{key}={value}" for key, value in flags.items()])))
    run.metrics.refresh()
    found = paired_items(run)
    assert found is not None
    first, last, items, lost, gained = found
    assert (first, last, items) == (0, 16, len(parts["held_out"]))
    assert (gained - lost) / items >= 0.3
    assert mcnemar(lost, gained) < 0.01
    assert "so the gain is established" in (run.path / "report.md").read_text(encoding="utf-8")
    assert run.metrics.series("rollout/length_mean")[1][-1] > 1.3 * run.metrics.series("rollout/length_mean")[1][0]
