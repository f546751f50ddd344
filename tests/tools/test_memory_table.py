"""`grpo memory`: a config and machines -> a table of estimates."""

import json
from pathlib import Path

import pytest
import yaml

from grpo.errors import ConfigError
from grpo.tools import memory_published
from grpo.tools.memory_published import estimate_published
from grpo.tools.memory_table import format_table, main
from tests.fakes import tiny_folder

ROOT = Path(__file__).parents[2]


def test_one_column_per_machine_and_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_folder(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()  # no weights are read
    single, sharded = (str(ROOT / "accelerate_configs" / f"{name}.yaml") for name in ("single_gpu", "fsdp2"))
    flags = [f"--model.name={tmp_path / 'model'}", "--machine", single, sharded, "--available", "80"]
    main([*flags, "--output", str(tmp_path / "memory.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["GiB", "per", "process", "single_gpu", "fsdp2"]
    assert lines[-1].split() == ["fits", "80", "GiB", "yes", "yes"]
    stored = json.loads((tmp_path / "memory.json").read_text())
    processes = yaml.safe_load(Path(sharded).read_text())["num_processes"]
    assert stored["fsdp2"]["AdamW"] == pytest.approx(stored["single_gpu"]["AdamW"] / processes)
    assert stored["single_gpu"]["peak"] > stored["fsdp2"]["peak"]


def test_the_table_by_hand() -> None:
    estimates = {"a": {"weights": 2.0, "peak": 3.0}, "b": {"weights": 10.0, "start": 1.0, "peak": 12.0}}
    assert format_table(estimates, 4) == (
        "GiB per process      a       b\n"
        "weights          2.000  10.000\n"
        "start                -   1.000\n"
        "peak             3.000  12.000\n"
        "fits 4 GiB         yes      no"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--available", "0"], "--available is 0.0, it must be above 0 GiB"),
        (["--published", "--steps=3"], "--published has settings of its own: leave --steps=3 out"),
        (["--stepps=3"], "unknown flag --stepps"),
        (["--machine", "none.yaml"], "cannot read the accelerate config none.yaml"),
    ],
)
def test_a_wrong_flag_is_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(words)


@pytest.mark.slow
def test_the_stored_table_of_published_shapes_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows, machines and command; one small shape is computed again."""
    stored = json.loads((ROOT / "docs" / "results" / "memory_fits.json").read_text(encoding="utf-8"))
    assert [(row["model"], row["way"]) for row in stored["rows"]] == [
        (model, method) for model in memory_published.PUBLISHED for method in memory_published.METHODS
    ]
    tiny = {"tiny": (64, 128, 2, 4, 2, 512, True)}
    monkeypatch.setattr(memory_published, "PUBLISHED", tiny)
    report = estimate_published()
    assert {key: report[key] for key in ("command", "what", "settings")} == {
        key: stored[key] for key in ("command", "what", "settings")
    }
    assert [list(row["gib_per_gpu"]) for row in report["rows"]] == [list(stored["rows"][0]["gib_per_gpu"])] * 3
