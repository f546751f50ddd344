"""One thread for every run that a test starts in a new process, because threads slow down models this small.

It holds for the whole session: runs are compared to the bit, and the number of threads changes the last bits.
"""

from collections.abc import Iterator

import pytest

import grpo.kernels.cpu.compiler
import grpo.kernels.cpu.panels
import grpo.kernels.registry
import grpo.runtime.device


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo.runtime.device, "cpu_threads", lambda processes_here: 1)
        yield


@pytest.fixture(autouse=True)
def kernels_of_one_test() -> Iterator[None]:
    """Switch kernels that a test turned off on again, so that later tests have them."""
    before = dict(grpo.kernels.registry._failed)
    yield
    grpo.kernels.registry._failed.clear()
    grpo.kernels.registry._failed.update(before)


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test twice: with the C functions, and as on a machine without a C compiler."""
    if request.param == "torch":
        for module in (grpo.kernels.cpu.compiler, grpo.kernels.cpu.panels):
            monkeypatch.setattr(module, "compiled", lambda source, **functions: None)
    elif grpo.kernels.cpu.compiler.library() is None:
        pytest.skip("there is no C compiler here")
    return str(request.param)
