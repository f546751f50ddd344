"""Variance of a fork's difference, as docs/verify.md states it."""

import pytest

from benchmarks.fork_variance import CHANGES, METRICS, STEPS, table, variances
from benchmarks.shared import DOCS, RESULTS, read_json

STORED = RESULTS / "fork_variance.json"


def test_variances_by_hand() -> None:
    """Differences 1, 1, 1: no variance. Independent: that of 0, 1, 2 is 1, and that of 1, 2, 3 too."""
    assert variances([0.0, 1.0, 2.0], [1.0, 2.0, 3.0]) == (0.0, 2.0)


def test_the_page_has_the_table_of_the_results() -> None:
    assert "\n".join(table(read_json(STORED))) in (DOCS / "verify.md").read_text()


def test_common_random_numbers_reduce_the_variance_at_least_five_times() -> None:
    runs = read_json(STORED)["runs"]
    for change in CHANGES:
        for name in METRICS:
            for step in range(STEPS):
                old, new = ([steps[step][name] for steps in runs[key]] for key in ("", change))
                common, independent = variances(old, new)
                assert independent >= 5 * common or old == pytest.approx(new)
