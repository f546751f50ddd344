"""Metric declarations: one table, which docs/metrics.md and the console show."""

from pathlib import Path

import pytest

from grpo.tracking.metrics import METRICS, Metric, find_metric, markdown_table, register_metric

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
