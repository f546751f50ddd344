"""Readers of run directories: columns, one step of many, the report, the model card."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from grpo.config.schema import DataConfig
from grpo.data.card import record_card
from grpo.errors import ConfigError, StorageError
from grpo.runtime.command import run_main
from grpo.tools import export
from grpo.tracking.model_card import model_card, publish, push
from grpo.tracking.report import attribution, fenced, length_buckets, paired_items, write_report
from grpo.tracking.rollout_reader import Judgement, groups_of, judge, last_step, matching, rows_of_step
from grpo.tracking.run_reader import MetricsFile, RunFolder, find_runs, thin

HOSTILE = "```\n<img src=x onerror=alert(1)>\n[a](javascript:1)\x1b[2J\u202e"


def rollout(step: int, draw: int, sample: int, right: int, length: int, text: str = "text") -> dict[str, Any]:
    return {
        "step": step,
        "draw": draw,
        "sample": sample,
        "prompt": f"question {draw}",
        "completion": text,
        "reward": right + 0.2,
        "advantage": right - 0.5,
        "rewards": {"accuracy": float(right), "xml_format": 1.0},
        "length": length,
        "ended": True,
        "columns": {"answer": "5", "pair_id": draw},
    }


def write_run(folder: Path, steps: int = 20, groups: int = 2) -> Path:
    """Write a run directory: accuracy rises from 0 to 1, long completions are right."""
    folder.mkdir()
    metrics = [{"step": 0, "eval/accuracy": 0.25, "eval/accuracy_ci95": 0.1, "eval/format": 1.0}]
    rollouts = []
    for step in range(1, steps + 1):
        share = (step - 1) / (steps - 1)
        metrics.append(
            {
                "step": step,
                "reward/mean": share + 0.2,
                "reward/accuracy/mean": share,
                "reward/xml_format/mean": 1.0,
                "policy/kl": 0.01 * step,
                "time/step": 2.0,
                "time/rollout": 1.5,
            }
        )
        rollouts += [
            rollout(step, step * groups + g, s, s % 2, 10 + 5 * (s % 2)) for g in range(groups) for s in range(4)
        ]
    metrics[-1] |= {"eval/accuracy": 0.75, "eval/accuracy_ci95": 0.1, "eval/format": 1.0}
    rollouts[-1]["completion"] = HOSTILE
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rollouts))
    config = {"seed": 3, "rewards": {"accuracy": 1.0, "xml_format": 0.2}, "data": {"name": "gsm8k"}}
    config |= {"model": {"name": "Qwen/Qwen2.5-0.5B"}, "steps": steps}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"git_commit": "abc", "versions": {"torch": "2.13.0"}}))
    return folder


def test_metrics_are_read_once_and_followed(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert not file.refresh()
    with (tmp_path / "metrics.jsonl").open("w") as growing:
        growing.write('{"step": 0, "a": 1.0}\n{"step": 1, "b": 2.0, "c": null}\n{"step": 2, "a"')
        growing.flush()
        assert file.refresh() and file.steps.tolist() == [0, 1]
        growing.write(': 5}\nnonsense\n{"step": 3, "b": 4}\n')
        growing.flush()
        assert file.refresh() and file.steps.tolist() == [0, 1, 2, 3]
    assert not file.refresh()
    assert file.series("a") == ([0, 2], [1.0, 5]) and file.series("b") == ([1, 3], [2.0, 4])
    assert file.last("b") == 4 and file.last("z") is None
    (tmp_path / "new").write_text('{"step": 0, "a": 7}\n')  # a resume rewrites the file
    (tmp_path / "new").replace(tmp_path / "metrics.jsonl")
    assert file.refresh() and file.series("a") == ([0], [7])


def test_one_step_is_found_among_many(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    rows = [rollout(step, step, s, 0, 5, "x" * (step * 37 % 900)) for step in range(1, 300, 2) for s in range(step % 5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 301, "dr')
    for step in range(0, 303):
        assert rows_of_step(path, step) == [row for row in rows if row["step"] == step]
    assert last_step(path) == rows[-1]["step"]
    assert rows_of_step(tmp_path / "none", 1) == [] and last_step(tmp_path / "none") is None


def test_filters_and_groups(tmp_path: Path) -> None:
    rows = [rollout(1, draw, s, s, 5, f"Text {s}") for draw in (4, 2) for s in (0, 1)]
    assert [row["draw"] for row in matching(rows, correct=True)] == [4, 2]
    assert matching(rows, text="QUESTION 2", lowest=1.0) == [rows[3]]
    assert matching(rows, highest=0.5, text="text 0") == [rows[0], rows[2]]
    assert {draw: len(group) for draw, group in groups_of(rows).items()} == {4: 2, 2: 2}
    assert thin([1, 2, 3, 4], [0.0, 1.0, 4.0, 5.0], points=2) == ([1.5, 3.5], [0.5, 4.5])


def test_the_report_tests_the_same_items_before_and_after(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    before, after = [1] * 3 + [0] * 17, [0] + [1] * 2 + [1] * 9 + [0] * 8  # 9 gained, 1 lost
    rows = [
        {"step": step, "draw": draw, "question": "q", "accuracy": float(right)}
        for step, answers in ((0, before), (10, before), (20, after))
        for draw, right in enumerate(answers)
    ]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert paired_items(RunFolder(run)) is None  # nothing of metrics.jsonl has been read
    text = write_report(run).read_text()
    # 2 * (C(10, 0) + C(10, 1)) / 2^10 = 22 / 1024 = 0.0215
    assert (
        "the same 20 items at step 0 and at step 20: 9 gained, 1 lost; McNemar's exact test p = 0.021, so the gain is"
        in text
    )
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    assert "Paired" not in write_report(run).read_text()  # not the same items


def test_the_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    text = write_report(run).read_text()
    assert "| `eval/accuracy` | 0.250 [0.150, 0.350] (step 0) | 0.750 [0.650, 0.850] (step 20) | +0.500 |" in text
    # accuracy: the mean of steps 1 and 2 is 0.5/19, of 19 and 20 18.5/19; xml_format never changed
    assert (
        "| `accuracy` | 1 | 0.026 | 0.974 | +0.947 |" in text
        and "| `xml_format` | 0.2 | 1.000 | 1.000 | +0.000 |" in text
    )
    assert "| last steps | 10 to 10 | 20 | 0.000 | 0.000 to 0.161 |" in text
    assert "| last steps | 15 to 15 | 20 | 1.000 | 0.839 to 1.000 |" in text
    assert "| `time/rollout` | 30.0 s | 75% | 1.500 s |" in text
    assert "reward 1.200 (accuracy 1.0, xml\\_format 1.0)" in text
    for picture in ("report_curves.png", "report_lengths.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG") and picture in text
    assert "\x1b" not in text
    with pytest.raises(ConfigError, match="no metrics.jsonl"):
        write_report(tmp_path)


def test_without_right_and_wrong_the_report_shows_the_reward_by_length(tmp_path: Path) -> None:
    """Rewards 0.2 and 1.2 at lengths 10 and 15; the middle is 0.7."""
    run = write_run(tmp_path / "run")
    text = (run / "rollouts.jsonl").read_text().replace('"accuracy"', '"chrf"')
    (run / "rollouts.jsonl").write_text(text)
    text = write_report(run).read_text()
    assert "## Length against reward" in text and "| tokens | completions | reward | 95 % interval |" in text
    assert "| last steps | 10 to 10 | 20 | 0.200 |  |" in text and "| last steps | 15 to 15 | 20 | 1.200 |  |" in text
    rows = [rollout(1, 0, s, s % 2, 5) | {"rewards": {}} for s in range(3)]
    assert judge(rows) == Judgement([False, True, False], ("reward above 0.7", "reward up to 0.7"))
    assert judge(rows[:1]).verdicts == [None] and judge([rows[0] | {"rewards": {"accuracy": 1.0}}]).verdicts == [True]


def test_a_completion_cannot_leave_its_block() -> None:
    lines = fenced(HOSTILE)
    assert lines[0] == "````text" and lines[-1] == "````" and "\\x1b[2J\\u202e" in lines[1]


def test_parts_add_up_and_equal_lengths_stay_together(tmp_path: Path) -> None:
    file = MetricsFile(write_run(tmp_path / "run") / "metrics.jsonl")
    file.refresh()
    parts = attribution(file, {"accuracy": 2.0, "xml_format": 0.2, "missing": 1.0})
    assert [name for name, *_ in parts] == ["accuracy", "xml_format"]
    assert sum(part for *_, part in parts) == pytest.approx(2 * 18 / 19)
    rows = [rollout(1, 0, 0, int(length > 3), length) for length in (1, 2, 2, 2, 2, 3, 4, 9)]
    assert [(low, high, sum(right), len(right)) for low, high, right in length_buckets(rows, buckets=4)] == [
        (1, 2, 0, 5),
        (3, 4, 1, 2),
        (9, 9, 1, 1),
    ]


def test_runs_are_found_and_links_are_not_followed(tmp_path: Path) -> None:
    write_run(tmp_path / "runs")
    write_run(tmp_path / "runs" / "inner")
    (tmp_path / "runs" / "link").symlink_to(tmp_path)
    assert sorted(run.name for run in find_runs(tmp_path / "runs")) == ["inner", "runs"]
    assert find_runs(tmp_path / "none") == []


def test_the_model_card_holds_what_the_run_holds(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a<script>")
    card = model_card(run, licence="apache-2.0", data_card={"permission": "given [x](javascript:1)"})
    card.save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.license == "apache-2.0" and read.data.base_model == "Qwen/Qwen2.5-0.5B"
    assert [result.metric_value for result in read.data.eval_results] == [0.75, 1.0]
    assert "| accuracy | 0.250 (step 0) | 0.750 (step 20) |" in read.text
    assert "seed: 3" in read.text and "torch 2.13.0" in read.text and "<script>" not in read.text
    assert "permission: given \\[x\\](javascript:1)" in read.text
    assert "licence: not stated" in read.text.lower()
    with pytest.raises(ConfigError, match="no run directory"):
        model_card(tmp_path)


class Hub(BaseHTTPRequestHandler):
    """The four calls of the hub's HTTP API that a small upload makes."""

    commits: list[list[dict]] = []
    refuses: str | None = None
    """A part of the addresses that are answered with 405."""

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        if self.refuses is not None and self.refuses in self.path:
            self.send_response(405)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path == "/api/repos/create":
            answer: dict = {"url": "https://huggingface.co/me/model", "name": "me/model"}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            answer = {
                "files": [
                    {**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
                ]
            }
        elif "/commit/" in self.path:
            self.commits.append([json.loads(line) for line in body.splitlines()])
            answer = {"success": True, "commitOid": "0" * 40, "commitUrl": "https://huggingface.co/me/model/commit/0"}
        else:
            self.send_response(404)
            self.end_headers()
            return
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:  # noqa: N802
        content = json.dumps({"id": "me/model", "sha": "0" * 40, "siblings": []}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the address of a stand-in for the hub, which stores its commits."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    Hub.commits.clear()
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def trained_on_a_file(folder: Path, permission: str | None) -> Path:
    """Write a run on a local file, with or without a data card."""
    run = write_run(folder / "run")
    (folder / "mine.jsonl").write_text("")
    if permission is not None:
        (folder / "data_card.yaml").write_text(f"source: us\nlicence: cc-by-4.0\npermission: {permission}\n")
    record_card(run, DataConfig(name="question_answer", path=str(folder / "mine.jsonl")))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["path"] = str(folder / "mine.jsonl")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def test_publish_to_a_stand_in_of_the_hub(tmp_path: Path, hub: str) -> None:
    folder = tmp_path / "final"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    run = trained_on_a_file(tmp_path, "granted")
    assert "me/model" in publish(run, folder, "me/model", licence="mit", token="hf_test", endpoint=hub)
    [commit] = Hub.commits
    assert sorted(line["value"]["path"] for line in commit if line["key"] == "file") == ["README.md", "config.json"]
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and str(tmp_path) not in card.text
    for line in ("- source: us", "- licence: cc-by-4.0", "- permission: granted", "path: mine.jsonl"):
        assert line in card.text
    with pytest.raises(StorageError, match=rf"try again with: hf upload me/model {folder} --private$"):
        push(folder, "me/model", token="hf_test", endpoint="http://127.0.0.1:9")
    with pytest.raises(StorageError, match=rf"try again with: hf upload me/model {folder}$"):
        push(folder, "me/model", token="hf_test", endpoint="http://127.0.0.1:9", private=False)


def export_command(tmp_path: Path, hub: str, monkeypatch: pytest.MonkeyPatch, *flags: str) -> tuple[Path, Callable]:
    """Return a finished run on permitted data, and the export command that pushes it to the stand-in."""
    run = trained_on_a_file(tmp_path, "granted")
    (run / "final").mkdir()
    (run / "final" / "model.safetensors").write_text("weights")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub)
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrst")
    words = ["--run", str(run), "--format", "merged", *flags, "--push", "me/model"]
    return run, lambda *more: export.main([*words, *more])


@pytest.mark.parametrize("refused", ["/api/repos/create", "/preupload/", "/commit/"])
def test_a_push_that_fails_loses_nothing(
    tmp_path: Path, hub: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refused: str
) -> None:
    """A failure at each call: exit code 3, the command to try again, and a complete folder to upload later."""
    run, main = export_command(tmp_path, hub, monkeypatch)
    monkeypatch.setattr(Hub, "refuses", refused)
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    out, err = capsys.readouterr()
    folder = run / "export" / "merged"
    assert ended.value.code == 3 and "Pushed" not in out and str(folder) in out
    assert f"error: cannot push {folder} to me/model: " in err and "405" in err and "hf_abc" not in err
    assert err.endswith(f"The folder is complete; try again with: hf upload me/model {folder} --private\n")
    assert (folder / "model.safetensors").read_text() == "weights" and (folder / "README.md").is_file()
    assert Hub.commits == []
    monkeypatch.setattr(Hub, "refuses", None)
    push(folder, "me/model", endpoint=hub)  # what `hf upload` does
    [commit] = Hub.commits
    names = [line["value"]["path"] for line in commit if line["key"] == "file"]
    assert sorted(names) == ["README.md", "model.safetensors"]


def test_export_writes_the_card_and_pushes(
    tmp_path: Path, hub: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, main = export_command(tmp_path, hub, monkeypatch, "--licence", "mit")
    main()
    assert "Pushed: " in capsys.readouterr().out
    [commit] = Hub.commits
    assert sorted(line["value"]["path"] for line in commit if line["key"] == "file") == [
        "README.md",
        "model.safetensors",
    ]
    assert ModelCard.load(run / "export" / "merged" / "README.md").data.license == "mit"

    (run / "data_card.json").write_text((run / "data_card.json").read_text().replace("granted", "prohibited"))
    with pytest.raises(ConfigError, match="permission: prohibited. To publish"):
        main("--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists() and len(Hub.commits) == 1


def test_the_card_of_a_checkpoint_tells_of_its_step(tmp_path: Path) -> None:
    card = model_card(write_run(tmp_path / "run"), step=10)
    assert "10 steps." in card.text and "| accuracy | 0.250 (step 0) | 0.250 (step 0) |" in card.text
    assert [result.metric_value for result in card.data.eval_results] == [0.25, 1.0]


@pytest.mark.parametrize("permission", ["unknown", "prohibited", None])
def test_nothing_is_sent_that_the_data_card_does_not_permit(tmp_path: Path, hub: str, permission: str | None) -> None:
    run = trained_on_a_file(tmp_path, permission)
    message = "local data without a data card" if permission is None else f"permission: {permission}. To publish"
    with pytest.raises(ConfigError, match=message):
        publish(run, tmp_path, "me/model", endpoint=hub)
    assert Hub.commits == [] and not (tmp_path / "README.md").exists()
