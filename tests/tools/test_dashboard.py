"""The dashboard without a browser: reading, drawing, and access."""

import html
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo.errors import ConfigError
from grpo.tools.dashboard.app import check_exposure, serve
from grpo.tools.dashboard.board import Board
from grpo.tools.dashboard.command import read_auth
from grpo.tools.dashboard.completions_tab import (
    WIDTHS,
    _cell,
    _legend,
    _numbers_of,
    _title,
    _told,
    alike,
    columns_of,
    find,
)
from grpo.tools.dashboard.page import _findings, _main_number
from grpo.tracking import curves
from grpo.tracking.curves import CURVES, Curve, lines_of
from grpo.tracking.drawing import Line, plot, readable, ticks
from grpo.tracking.rollout_reader import (
    judge,
    last_step,
    matching,
    rows_of_step,
    search,
    told_turns,
    whole_completion,
)
from grpo.tracking.run_reader import MetricsFile, RunFolder, extremes, find_runs, thin

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> [x](javascript:alert(1))"
)


def write_run(folder: Path, steps: int = 6, completion: str = "4", **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(json.dumps({"steps": 10, "seed": 0} | config))
    for step in range(1, steps + 1):
        add_step(folder, step, completion)
    return folder


def add_step(folder: Path, step: int, completion: str = "4") -> None:
    row = {"step": step, "reward/mean": step / 10, "reward/accuracy/mean": step / 20, "my/own": 7.0, "time/step": 2.0}
    evaluated = {"eval/accuracy": step / 10} if step % 2 else {}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row | evaluated) + "\n")
    common = {"step": step, "draw": step, "prompt": f"2+2={completion}", "reward": 0.5, "length": 1, "ended": True}
    with (folder / "rollouts.jsonl").open("a") as file:
        for sample in range(4):
            judged = {"rewards": {"accuracy": float(sample % 2)}, "advantage": sample - 1.5, "sample": sample}
            columns = {"columns": {"answer": "4", "pair_id": 11}}
            file.write(json.dumps(common | judged | columns | {"completion": f"{completion} #{sample}"}) + "\n")


def test_a_refresh_reads_only_what_was_added(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=3)
    metrics = MetricsFile(folder / "metrics.jsonl")
    assert metrics.refresh()
    changes = metrics.changes
    assert not metrics.refresh() and metrics.changes == changes
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "late/key": 1.5}\n{"damaged\n{"step": 5, "reward/mean": null}\n{"step": 6, "rew')
    assert metrics.refresh() and metrics.changes == changes + 1
    assert metrics.steps.tolist() == [1, 2, 3, 4, 5]
    assert metrics.series("late/key") == ([4], [1.5])
    assert metrics.series("reward/mean") == ([1, 2, 3], [0.1, 0.2, 0.3])
    assert metrics.series("eval/accuracy") == ([1, 3], [0.1, 0.3])
    assert metrics.series("no/key") == ([], []) and metrics.last("my/own") == 7.0
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('ard/mean": 0.9}\n')
    metrics.refresh()
    assert metrics.series("reward/mean") == ([1, 2, 3, 6], [0.1, 0.2, 0.3, 0.9])
    (folder / "new").write_text('{"step": 1, "reward/mean": 5}\n')  # a resume rewrites the file
    (folder / "new").rename(folder / "metrics.jsonl")
    assert metrics.refresh() and metrics.series("reward/mean") == ([1], [5.0])


def test_the_whole_of_a_long_file_in_few_points_that_keep_its_extremes(tmp_path: Path) -> None:
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(20_001):
            value = {777: 5e6, 9_999: -7.0}.get(step, float(step))
            file.write(json.dumps({"step": step, "reward/mean": value, "policy/kl": 1.0}) + "\n")
    run = RunFolder(tmp_path)
    run.metrics.refresh()
    [line] = lines_of(CURVES[0], [run])
    assert 250 < len(line.steps) == len(line.values) == len(line.highs) <= curves.POINTS
    assert line.highs.max() == 5e6 and line.lows.min() == -7.0
    assert line.ends == (0, 20_000) and line.last == 20_000.0
    assert line.steps[:2].tolist() == line.values[:2].tolist() == [33.0, 100.0]  # means over 67 steps
    assert line.lows[:2].tolist() == [0.0, 67.0] and line.highs[:2].tolist() == [66.0, 133.0]


def test_extremes_by_hand() -> None:
    lows, highs = extremes(np.array([0.0, 1.0, 4.0, 3.0, 9.0]), points=2)
    assert (lows.tolist(), highs.tolist()) == ([0.0, 3.0], [4.0, 9.0])
    assert [each.tolist() for each in extremes(np.array([2.0, 1.0]), points=2)] == [[2.0, 1.0], [2.0, 1.0]]


def line(steps: list[float], values: list[float], name: str = "mean") -> Line:
    at, value = np.array(steps), np.array(values)
    return Line(name, at, value, value, value, (steps[0], steps[-1]), values[-1])


def test_a_plot_by_hand() -> None:
    drawn = plot("Reward", "Should rise.", [line([1, 2, 3], [0, 4, 2])])
    # 20 and 980 of 1000: 2 % are left free above and below
    assert "d='M0 980L500 20L1000 500'" in drawn and "class='dots'" in drawn and "class='band'" not in drawn
    for bottom, label in (("2.00%", "0"), ("26.00%", "1"), ("98.00%", "4")):
        assert f"<i class='y' style='bottom:{bottom}'>{label}</i>" in drawn
    assert "<i class='x' style='left:50.00%'>2</i>" in drawn and "newest <b>2</b>" in drawn
    [under_pointer] = json.loads(html.unescape(drawn.split('data-lines="')[1].split('"')[0]))
    assert (under_pointer["steps"], under_pointer["values"]) == ([1, 2, 3], [0, 4, 2])
    wide = Line(
        "a", np.array([1.0, 2.0]), np.array([1.0, 1.0]), np.array([0.0, 1.0]), np.array([2.0, 1.0]), (1, 2), 1.0
    )
    assert "<path class='band' fill='#3b7dd8' d='M0 20L1000 500L1000 500L0 980Z'/>" in plot("", "", [wide])


def test_plots_of_next_to_nothing_and_of_hostile_names() -> None:
    assert "nothing yet" in plot("Reward", "", [])
    assert "d='M500 500'" in plot("", "", [line([7], [0.25])])  # one step, one value: in the middle
    several = plot("", "", [line([1, 2], [1, 2], HOSTILE), line([1, 2], [2, 1], "b")])
    assert "<img" not in several and "<script" not in several and "b <b>1</b>" in several


@pytest.mark.parametrize(
    "low, high, whole, expected",
    [
        (0.571, 0.612, False, "0.58 0.59 0.60 0.61"),
        (1, 85_000, True, "20,000 40,000 60,000 80,000"),
        (1, 3, True, "1 2 3"),
        (0, 1, False, "0.0 0.2 0.4 0.6 0.8 1.0"),
        (-1e-7, 1e-7, False, "-1e-07 -5e-08 0 5e-08 1e-07"),
        (0, 0, False, "0"),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, whole: bool, expected: str) -> None:
    assert " ".join(label for _, label in ticks(low, high, whole=whole)) == expected


def test_numbers_that_are_read_at_a_glance() -> None:
    numbers = [0, 0.73642, 12.3456, 3079.4, 1e-7, -0.5, 5e8]
    assert [readable(number) for number in numbers] == ["0", "0.7364", "12.35", "3,079", "1.00e-07", "-0.5", "5.00e+08"]


def test_thin_by_hand() -> None:
    assert thin([1, 2, 3, 4], [0, 1, 4, 5], points=2) == ([1.5, 3.5], [0.5, 4.5])
    assert thin([1, 2, 3], [0.0, 1.0, 5.0], points=2) == ([1.5, 3.0], [0.5, 5.0])
    assert thin([1, 2], [3, 4]) == ([1.0, 2.0], [3.0, 4.0]) and thin([], []) == ([], [])


def test_smooth_by_hand() -> None:
    # 1;  (0.5 * 1 + 3) / 1.5;  (0.25 * 1 + 0.5 * 3 + 5) / 1.75
    assert curves.smooth(np.array([1.0, 3.0, 5.0]), 0.5).tolist() == pytest.approx([1, 3.5 / 1.5, 6.75 / 1.75])
    assert curves.smooth(np.array([1.0, 3.0]), 0.0).tolist() == [1.0, 3.0]


def test_lines_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    runs = [RunFolder(write_run(tmp_path / name, steps=2)) for name in ("a", "b")]
    for run in runs:
        run.metrics.refresh()
    both = Curve("", "reward/mean|my/own", "")

    def names(curve: Curve, runs: list[RunFolder]) -> list[str]:
        return [each.name for each in lines_of(curve, runs)]

    assert names(CURVES[0], runs[:1]) == ["mean"] and names(both, runs[:1]) == ["mean", "own"]
    assert names(CURVES[0], runs) == ["a", "b"]
    assert names(both, runs) == ["mean · a", "own · a", "mean · b", "own · b"]
    assert curves.other_keys(runs) == ["my/own", "time/step"]


def test_a_color_belongs_to_a_run_and_a_dash_pattern_to_a_metric(tmp_path: Path) -> None:
    """A run keeps its color when another one is left out, and has the same in curves of one and of several metrics."""
    for name in ("a", "b", "c"):
        write_run(tmp_path / name, steps=2)
    board = Board(tmp_path, tmp_path / "feedback.jsonl")
    board.refresh()
    runs = board.chosen(["a", "b", "c"])
    both = Curve("", "reward/mean|my/own", "")
    assert [(line.name, line.color, line.dash) for line in lines_of(both, runs[:2])] == [
        ("mean · a", 0, 0),
        ("own · a", 0, 1),
        ("mean · b", 1, 0),
        ("own · b", 1, 1),
    ]
    assert [line.color for line in lines_of(CURVES[0], board.chosen(["c", "b"]))] == [2, 1]
    runs[2].color = 8 + runs[0].color  # the ninth run: the colors begin again
    assert curves.colors_of(runs) == {"a": 0, "b": 1, "c": 2}
    drawn = plot("", "", lines_of(both, runs[:2]))
    assert drawn.count("stroke-dasharray='6 4'") == 4 and drawn.count("stroke='#3b7dd8'") == 5  # line, dots, legend


def test_the_main_metric_is_the_accuracy_or_the_heaviest_reward(tmp_path: Path) -> None:
    judged = RunFolder(write_run(tmp_path / "a"))
    prose = RunFolder(write_run(tmp_path / "b", rewards={"chrf": 0.4, "mine.py:terms": 0.6}))
    row = {"step": 1, "eval/reward/terms/mean": 0.25, "eval/reward/terms/low": 0.125, "eval/reward/terms/high": 0.5}
    (prose.path / "metrics.jsonl").write_text(json.dumps(row | {"eval/reward/chrf/mean": 0.75}) + "\n")
    for run in (judged, prose):
        run.metrics.refresh()
    assert (curves.main_key(judged), curves.main_key(prose)) == ("eval/accuracy", "eval/reward/terms/mean")
    assert _main_number(judged) == [("held-out accuracy", "50.0%", "10.0% before", "")]
    assert _main_number(prose) == [("held-out terms", "0.250", "0.250 before, 95 %: 0.125 to 0.500", "")]
    headings, [first] = curves.comparison([prose])
    assert dict(zip(headings, first, strict=True))["held out"] == "terms"


def test_every_curve_has_its_hint_in_the_docs() -> None:
    documented = DOCS.read_text()
    for curve in CURVES:
        assert f"| {curve.title} | {curve.hint} |" in documented


def test_comparison_and_differences(tmp_path: Path) -> None:
    first = RunFolder(write_run(tmp_path / "a", steps=5, optimizer={"learning_rate": 1e-6}))
    second = RunFolder(write_run(tmp_path / "b", steps=1, optimizer={"learning_rate": 1e-5}, run_dir="x"))
    (second.path / "final").mkdir()
    for run in (first, second):
        run.metrics.refresh()
    headings, rows = curves.comparison([first, second])
    assert dict(zip(headings, rows[0], strict=True)) == {
        "run": "a",
        "state": "training",
        "steps": "5",
        "held out": "accuracy",
        "before": "0.100",
        "after": "0.500",
        "reward, last tenth": "0.500",
        "tokens/s": "",
        "hours": "0.00",
    }
    assert rows[1][1] == "finished"
    assert curves.differences([first, second]) == (
        ["key", "a", "b"],
        [["optimizer.learning_rate", "1e-06", "1e-05"]],
    )
    assert curves.seconds_left(first) == 10.0 and curves.seconds_left(second) is None  # 5 steps of 2 s; done


def test_completions_of_a_step_and_filters(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=50, completion="Four")
    assert last_step(folder / "rollouts.jsonl") == 50
    for step in (1, 27, 50):
        rows = rows_of_step(folder / "rollouts.jsonl", step)
        assert [(row["step"], row["sample"]) for row in rows] == [(step, sample) for sample in range(4)]
    assert rows_of_step(folder / "rollouts.jsonl", 51) == []
    assert [row["sample"] for row in matching(rows, correct=True)] == [1, 3]
    assert [row["sample"] for row in matching(rows, text="fOUR #2")] == [2]
    assert matching(rows, lowest=0.6) == [] and len(matching(rows, lowest=0.5, highest=0.5)) == 4


@pytest.mark.parametrize("block", [1, 300, 1 << 20])  # shorter than a line, a line or so, the whole file
def test_a_search_over_steps_finds_the_newest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("grpo.tracking.rollout_reader._BLOCK", block)
    path = write_run(tmp_path / "run", steps=30) / "rollouts.jsonl"
    with path.open("a") as file:
        file.write('{"step": 30, "draw": 30, "half a li')  # it is being written

    def found(newest: int, oldest: int, most: int = 100) -> tuple[list[tuple[int, int]], int]:
        rows, reached = search(path, newest, oldest, lambda rows: matching(rows, text="4 #2"), most, seconds=60)
        return [(row["step"], row["sample"]) for row in rows], reached

    assert found(30, 0) == ([(step, 2) for step in range(30, 0, -1)], 0)
    assert found(12, 10) == ([(12, 2), (11, 2), (10, 2)], 10) and found(30, 30) == ([(30, 2)], 30)
    assert found(0, 0) == ([], 0) and found(99, 31) == ([], 31)
    newest, reached = found(30, 0, most=2)
    assert newest == [(30, 2), (29, 2)] and reached <= 29
    everything, _ = search(path, 30, 0, lambda rows: rows, 1000, seconds=60)
    assert [(row["step"], row["sample"]) for row in everything] == [(s, i) for s in range(30, 0, -1) for i in range(4)]
    assert search(tmp_path / "none", 3, 1, lambda rows: rows, 9) == ([], 3)


def test_the_board_searches_only_the_steps_that_it_is_asked_for(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", steps=20)
    board = Board(tmp_path / "runs", tmp_path / "feedback.jsonl")
    board.refresh()
    rows, oldest = find(board, "a", 15, 10, {"correct": True})
    assert len(rows) == 20 and oldest == 6 and {row["step"] for row in rows} == set(range(6, 16))
    assert _told(rows, 15, oldest) == "20 completions of steps 6 to 15. Click one for its whole group."
    assert _told(*find(board, "a", 15, 1, {"text": "nowhere"})[:1], 15, 15) == "No completion of step 15 fits."
    assert find(board, "a", 15, None, {})[1] == 0 and find(board, None, 15, 1, {}) == ([], 15)


def test_a_run_whose_rewards_do_not_say_what_is_right_has_no_such_column() -> None:
    row = {"step": 1, "prompt": "a", "completion": "b", "reward": 0.5, "advantage": 0.1, "length": 3}
    prose, judged = (row | {"rewards": rewards} for rewards in ({"chrf": 0.5}, {"accuracy": 1.0}))
    assert columns_of([prose]) == ["step", "prompt", "completion", "reward", "advantage", "tokens"]
    assert columns_of([prose, judged]) == columns_of([]) == list(WIDTHS)
    assert [_cell(judged, name) for name in WIDTHS] == ["1", "a", "b", "0.500", "+0.100", "yes", "3"]


def test_answers_that_are_alike_are_one_card() -> None:
    rows = [{"sample": s, "completion": text, "reward": 1.0, "step": 7} for s, text in enumerate("aabab")]
    rows.append({"sample": 5, "completion": "a", "reward": 0.0, "step": 7})
    parts = alike(rows)
    assert [[row["sample"] for row in part] for part in parts] == [[0, 1, 3], [2, 4], [5]]
    assert [_numbers_of(part) for part in parts] == ["#0 and 2 like it", "#2 and 1 like it", "#5"]
    told = _legend(rows, 3, judge([part[0] for part in parts]))
    assert told == "Step 7: 6 completions, 3 different. Green: reward above 0.5. Red: reward up to 0.5."


def test_turns_and_calls_are_shown_searched_and_told_apart() -> None:
    messages = [
        {"role": "assistant", "content": "<tool_call>6*7</tool_call>", "tokens": 5, "tool_calls": [{"name": "times"}]},
        {"role": "tool", "name": "multiply", "content": "42\n"},
        {"role": "assistant", "content": "It is 42.", "tokens": 3},
    ]
    turns = {"messages": messages, "reward": None, "calls": 1, "failures": 0}
    row = {"sample": 0, "completion": "It is 42.", "reward": 1.0, "step": 7, "length": 8, "turns": turns}
    assert whole_completion(row) == (
        "[assistant, 5 tokens]\n<tool_call>6*7</tool_call>\n[tool multiply]\n42\n[assistant, 3 tokens]\nIt is 42."
    )
    assert _title([row]).endswith("8 tokens · 2 turns, 1 call") and told_turns({"completion": "a"}) == ""
    failed = row | {"sample": 1, "turns": turns | {"messages": messages[:2] + messages[:1], "failures": 1}}
    assert told_turns(failed) == "2 turns, 1 call, 1 failed" and len(alike([row, failed])) == 2
    assert matching([row], text="tool_call>6") == [row] and matching([row], text="[TOOL multiply]") == [row]
    for broken in ({"messages": "x"}, {"messages": [1]}, "x", {"messages": messages[:1], "calls": "many"}):
        assert whole_completion(row | {"turns": broken}) == "It is 42."
        assert told_turns(row | {"turns": broken}) in ("", "1 turn")


def test_what_a_run_found_about_itself_is_shown_and_stays_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert _findings([RunFolder(folder)]) == ""
    found = {"step": 20, "name": "dead:x", "text": "reward 'x' has been 0", "mend": HOSTILE}
    (folder / "findings.jsonl").write_text(json.dumps(found) + '\n{"step": 21, "na')
    shown = _findings([RunFolder(folder)])
    assert "<b>reward &#x27;x&#x27; has been 0</b> <i>run, step 20</i>" in shown and shown.count("<li>") == 1
    assert "<script>" not in shown and "&lt;script&gt;" in shown


def test_a_board_opens_only_what_it_has_found(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a")
    write_run(tmp_path / "secret")
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "secret")
    board = Board(tmp_path / "runs", tmp_path / "feedback.jsonl")
    assert board.refresh() == ["a"] == [run.name for run in find_runs(tmp_path / "runs")]
    assert board.chosen(["../secret", "link", "/etc", ""]) == [] and board.models() == {}
    [run] = board.chosen(["a"])
    assert run.metrics.steps[-1] == 6
    board.refresh()
    assert board.chosen(["a"])[0] is run  # what was read stays read


@pytest.mark.parametrize(
    "host, share", [("0.0.0.0", False), ("127.0.0.1", True), ("192.168.1.5", False), ("box", False)]
)
def test_nobody_else_without_a_password(host: str, share: bool, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="GRPO_DASHBOARD_AUTH"):
        serve(tmp_path, tmp_path / "f.jsonl", host=host, share=share)
    check_exposure(host, share, ("name", "password"))


def test_this_machine_needs_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        check_exposure(host, False, None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRPO_DASHBOARD_AUTH", raising=False)
    assert read_auth() is None
    (tmp_path / ".env").write_text("GRPO_DASHBOARD_AUTH=me:a:b\n")
    assert read_auth() == ("me", "a:b")
    monkeypatch.setenv("GRPO_DASHBOARD_AUTH", "nobody")
    with pytest.raises(ConfigError, match="name:password"):
        read_auth()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    pytest.importorskip("gradio", reason='pip install -e ".[dashboard]"')
    root = tmp_path_factory.mktemp("served")
    write_run(root / "runs" / "hostile", completion=HOSTILE)
    (root / "runs" / "hostile" / ".env").write_text("HF_TOKEN=canary")
    (root / ".env").write_text("HF_TOKEN=canary")
    page, address = serve(root / "runs", root / "feedback.jsonl", block=False)
    yield address, root
    page.close()


def status_and_body(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_files_are_not_served(page: tuple[str, Path], record_property: Any) -> None:
    address, root = page
    requests = 0
    assert address.startswith("http://127.0.0.1:") and status_and_body(address)[0] == 200
    inside = root / "runs" / "hostile"
    targets = [inside / ".env", root / ".env", inside / "config.yaml", inside / "rollouts.jsonl", Path("/etc/passwd")]
    for target in [*targets, Path(__file__), Path.cwd() / "pyproject.toml"]:
        for route in (
            "file=",
            "gradio_api/file=",
            "gradio_api/file/",
            "file/",
            "static/../",
            "assets/../",
            "theme.css/",
        ):
            status, body = status_and_body(f"{address}{route}{target}")
            assert status in (403, 404, 405) and b"canary" not in body and b"root:" not in body, (route, target, status)
            requests += 1
    record_property("requests refused", requests)


def test_no_event_is_an_open_interface(page: tuple[str, Path]) -> None:
    _, body = status_and_body(page[0] + "gradio_api/info")
    assert json.loads(body) == {"named_endpoints": {}, "unnamed_endpoints": {}}
