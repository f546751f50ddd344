"""One thread for every run that a test starts in its own process: on models this small, threads wait more than they work.

For the whole session, since runs are compared to the last bit, and the number of threads changes that bit.
"""

from collections.abc import Iterator

import pytest

import grpo.distributed


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo.distributed, "cpu_threads", lambda processes_here: 1)
        yield
