"""One thread for every run that a test starts in its own process: on models this small, threads wait more than they work."""

import pytest

import grpo.distributed


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo.distributed, "cpu_threads", lambda processes_here: 1)
