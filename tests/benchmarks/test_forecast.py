"""Coverage of the forecasts, as docs/forecast.md states it."""

from benchmarks.forecast import MINUTES, QUANTITIES, covered, table
from benchmarks.shared import DOCS, RESULTS, read_json


def test_the_page_has_the_table_of_the_results() -> None:
    runs = read_json(RESULTS / "forecast.json")["runs"]
    assert "\n".join(table(runs)) in (DOCS / "forecast.md").read_text()


def test_what_happened_is_covered_as_often_as_claimed() -> None:
    runs = read_json(RESULTS / "forecast.json")["runs"]
    assert {run["kind"] for run in runs} <= set(MINUTES)
    hits = [hit for run in runs for name in QUANTITIES for hit in covered(run, name)]
    assert len(hits) >= 15 * 33 and sum(hits) / len(hits) >= 0.85


def test_an_interval_covers_its_ends() -> None:
    run = {"steps": {"flat": [{"low": 0.0, "high": 0.5, "happened": value} for value in (0.0, 0.5, 0.6)]}}
    assert covered(run, "flat") == [True, True, False]
