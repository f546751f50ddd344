"""Rates of the red team on planted rewards, as docs/rewards.md states them."""

import pytest
from planted_rewards import BUGGY, SOUND

from benchmarks.red_team import BUILT_IN, measure


@pytest.mark.slow
def test_rates_on_planted_rewards() -> None:
    findings = measure()["findings"]
    assert len(BUGGY) == 20 and len(SOUND) + len(BUILT_IN) == 10
    assert [name for name in BUGGY if not findings[name]["check"] + findings[name]["red_team"]] == []
    assert [name for name in [*SOUND, *BUILT_IN] if findings[name]["check"] + findings[name]["red_team"]] == []
