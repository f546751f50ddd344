"""docs/comparison.md is what launch/comparison.py makes of docs/results."""

from launch.comparison import PAGE, counted, page, read


def test_the_page_is_made_of_the_stored_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python launch/comparison.py"


def test_every_fact_about_another_system_names_where_it_was_read() -> None:
    peers = read("peers")
    for row in peers["rows"]:
        assert row["sources"], row["what"]
        assert set(row["cells"]) <= set(peers["systems"])


def test_counts_are_counted() -> None:
    now, stored = counted(), read("size")
    assert now.keys() == stored.keys()
    for key in ("lines", "files", "keys", "tests"):  # they move with every change: near is enough
        assert abs(now[key] - stored[key]) <= 0.5 * now[key], f"{key}: run python launch/comparison.py --count"
