"""docs/reliability.md equals the stored results and names existing tests."""

import json
from pathlib import Path

from benchmarks.reliability import NOT_HERE, PAGE, ROWS, STORED, page

TESTS = Path(__file__).parents[1]


def test_the_page_is_the_stored_results() -> None:
    assert page(json.loads(STORED.read_text())) == PAGE.read_text()


def test_every_row_names_tests_that_exist() -> None:
    for name, (_, tests) in ROWS.items():
        for test in tests:
            file, _, function = test.partition("::")
            assert f"def {function}(" in (TESTS / file).read_text() or not function, (name, test)
    wanted = {f"R{number}" for number in range(1, 35)} | {f"X{number}" for number in range(1, 15)}
    assert wanted == ROWS.keys() | NOT_HERE.keys()


def test_no_stored_row_failed() -> None:
    rows = json.loads(STORED.read_text())["rows"]
    assert {name: row["failed"] for name, row in rows.items() if row["failed"]} == {}
