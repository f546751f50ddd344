"""CUDA graphs: whatever fails, the step is done once and the run goes on without graphs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from grpo.kernels import registry
from grpo.kernels.cuda import graphs
from grpo.kernels.cuda.graphs import StepGraphs, are_equal


class Counter:
    """A step that adds 1 to its state, and the stand-in for a capture of it that ends with `error` or `reason`."""

    def __init__(self, error: RuntimeError | None = None, reason: str | None = None) -> None:
        self.state, self.error, self.reason = torch.zeros(3), error, reason

    def step(self) -> None:
        self.state += 1

    def capture(self, key: object, step: Callable[[], None], *_: object) -> str | None:
        step()  # a capture runs the step at least once before it fails
        if self.error is not None:
            raise self.error
        return self.reason


@pytest.mark.parametrize(
    ("error", "reason", "said"),
    [
        (
            RuntimeError("operation not permitted when stream is capturing\nmore"),
            None,
            "failed (operation not permitted",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), None, "no memory for a graph"),
        (None, "the first replay of a graph differs from the step without it", "differs from the step"),
    ],
)
def test_a_failed_capture_is_one_step_without_a_graph(
    error: RuntimeError | None, reason: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter, runner = Counter(error, reason), StepGraphs()
    monkeypatch.setattr(registry, "_failed", {})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "current")
    streams: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(runner, "_capture", counter.capture)
    assert not runner.run("key", counter.step, [counter.state])
    assert counter.state.tolist() == [1, 1, 1] and streams == ["current"] and not runner._graphs
    assert said in registry._failed["cuda_graphs"] and "\n" not in registry._failed["cuda_graphs"]


def test_an_error_of_the_device_is_not_taken_for_a_failed_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    counter, runner = Counter(RuntimeError("CUDA error: an illegal memory access was encountered")), StepGraphs()
    monkeypatch.setattr(registry, "_failed", {})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "current")
    monkeypatch.setattr(runner, "_capture", counter.capture)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        runner.run("key", counter.step, [counter.state])
    assert not registry._failed


def test_what_is_equal() -> None:
    tokens, logprobs = torch.tensor([3, 4]), torch.tensor([-1.0, float("nan")])
    assert are_equal([tokens, logprobs], [tokens.clone(), logprobs + 1e-3])
    assert not are_equal([tokens], [tokens + 1])
    assert not are_equal([logprobs], [logprobs + 0.1])


@pytest.mark.gpu
def test_replays_on_a_gpu_share_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_failed", {})
    device, runner = torch.device("cuda", 0), StepGraphs()
    state, results = torch.zeros(4, device=device), torch.zeros(4, device=device)

    def step(factor: float) -> None:
        state.add_(1)
        results.copy_((torch.ones(1000, 4, device=device) * state * factor).sum(0))

    for turn in range(3):
        for factor in (1.0, 2.0, 3.0):
            before = float(state[0])
            assert runner.run(factor, lambda factor=factor: step(factor), [state], [results])  # type: ignore[misc]
            assert float(state[0]) == before + 1, turn
            assert float(results[0]) == pytest.approx(1000 * factor * (before + 1))
    assert len(runner._graphs) == 3
    pools = {tuple(part["segment_pool_id"]) for part in torch.cuda.memory_snapshot()} - {(0, 0)}
    assert len(pools) == 1


@pytest.mark.gpu
def test_a_step_that_waits_for_the_gpu_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_failed", {})
    state, runner = torch.zeros(4, device="cuda"), StepGraphs()

    def step() -> None:
        state.add_(1)
        state.sum().item()

    assert not runner.run("key", step, [state])
    assert state.tolist() == [1, 1, 1, 1] and "cuda_graphs" in registry._failed
    assert float(Tensor.sum(state + 1)) == 8  # the device still works
    assert graphs.are_equal([state], [state])
