"""Metric declarations: one table, which docs/metrics.md and the console show."""

from pathlib import Path

import pytest

from grpo.tracking.metrics import (
    METRICS,
    Metric,
    find_metric,
    interval_of,
    is_interval,
    markdown_table,
    register_metric,
    with_interval,
)

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")


def test_the_page_shows_the_declarations() -> None:
    assert "\n".join(markdown_table()) in PAGE


def test_a_key_has_one_declaration() -> None:
    assert register_metric(METRICS["policy/kl"]) is METRICS["policy/kl"]
    with pytest.raises(ValueError, match="metric 'policy/kl' is registered already"):
        register_metric(Metric("policy/kl", "", "another"))


def test_a_key_is_found_by_name_or_form() -> None:
    assert find_metric("policy/kl") is METRICS["policy/kl"]
    assert find_metric("reward/my.py:mine/mean") is METRICS["reward/<name>/mean"]
    assert find_metric("my/own") is None
    assert METRICS["policy/kl"].show(0.00123) == "KL 0.0012"


def test_the_interval_of_a_metric_is_what_was_logged_beside_it() -> None:
    values = {"eval/accuracy": 1.0, "eval/accuracy_low": 0.9, "eval/accuracy_high": 1.0, "eval/format": 0.5}
    values |= {"eval/reward/my/mean": 0.5, "eval/reward/my/low": 0.25, "eval/reward/my/high": 0.625}
    assert interval_of(values, "eval/accuracy") == (0.9, 1.0)
    assert interval_of(values, "eval/reward/my/mean") == (0.25, 0.625)
    assert interval_of({"eval/accuracy": 0.5, "eval/accuracy_ci95": 0.25}, "eval/accuracy") == (0.25, 0.75)
    assert with_interval(values, "eval/format") == "0.500" and with_interval(values, "eval/chrf") == ""
    assert with_interval(values, "eval/accuracy") == "1.000 [0.900, 1.000]"
    assert [key for key in values if is_interval(key)] == [key for key in values if key.endswith(("_low", "_high"))] + [
        "eval/reward/my/low",
        "eval/reward/my/high",
    ]
    assert not is_interval("rollout/length_low") and not is_interval("eval/reward/my_low/mean")
