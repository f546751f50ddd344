"""docs/comparison.md equals the output of benchmarks/comparison.py on docs/results."""

import re
from pathlib import Path

from benchmarks.comparison import PAGE, counted, page, read
from launch.benchmark import readme_table

README = Path(__file__).parents[2] / "README.md"


def test_the_page_is_made_of_the_stored_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python benchmarks/comparison.py"


def test_every_fact_about_another_system_names_where_it_was_read() -> None:
    peers = read("peers")
    for row in peers["rows"]:
        assert row["sources"], row["what"]
        assert set(row["cells"]) <= set(peers["systems"])


def test_counts_are_counted() -> None:
    now, stored = counted(), read("size")
    assert now.keys() == stored.keys()
    for key in ("lines", "files", "keys", "tests"):  # they move with every change: near is enough
        assert abs(now[key] - stored[key]) <= 0.5 * now[key], f"{key}: run python benchmarks/comparison.py --count"


def test_the_table_of_speeds_is_what_the_stored_results_say() -> None:
    readme = README.read_text(encoding="utf-8")
    [names] = re.findall(r"benchmark\.py --readme ([^`]+)`", readme)
    results = [read(Path(name).stem) for name in names.split()]
    assert readme_table(results).strip() in readme
