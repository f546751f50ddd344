"""Out of memory is survived: in sampling with fewer slots, in the update with smaller batches, with the same result."""

import logging
from collections.abc import Callable, Hashable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from grpo.config.schema import Config, RolloutConfig
from grpo.experience import Experience, ExperienceCollector, Packed
from grpo.kernels.cuda.graphs import StepGraphs
from grpo.kernels.decode import Schedule
from grpo.models.strategies.deepspeed import Zero2
from grpo.models.strategies.single import DistributedDataParallel
from grpo.packing import PackedBatch, pack, regroup
from grpo.rollout.async_sampler import AsyncSampler
from grpo.rollout.engine import build_engine
from grpo.run.checkpointer import _is_unchanged
from grpo.runtime.distributed import OutOfMemoryElsewhere
from grpo.runtime.sums import Sums
from grpo.runtime.timing import Clock
from grpo.trainer import update
from grpo.types import Group, Prompt, SamplingPlan
from tests.fakes import CharTokenizer, group, tiny_folder, tiny_model
from tests.test_update import run_of, weights

ADVANTAGES = torch.tensor([[1.0, -0.5], [0.5, -1.0]], dtype=torch.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


def groups() -> list[Group]:
    return [group(0, [5, 6], [[7, 8, 9], [10, 11]]), group(1, [4], [[12, 13], [14, 15, 16]])]


def learn(run: Any, room: float, calls: int = 0, freed: float = 0) -> Sums:
    """Update once on a device that has memory for `room` tokens, after `calls` batches. tokens_per_batch is 16.

    The sampler can free memory for `freed` tokens more, once.
    """

    def give_up_memory() -> bool:
        nonlocal room, freed
        helps, room, freed = freed > 0, room + freed, 0
        return helps

    engine = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
    sampler = SimpleNamespace(engine=engine, give_up_memory=give_up_memory)
    parts = (run.config, run.accelerator, run.policy)
    run.collector = ExperienceCollector(*parts, sampler, None, None, tokens_per_batch=16)  # type: ignore[arg-type]
    logprobs, called = type(run.policy).logprobs, 0

    def limited(batch: PackedBatch) -> Any:
        nonlocal called
        called += 1
        if len(batch.input_ids_T) > room and called > calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return logprobs(run.policy, batch)

    run.policy.logprobs = limited
    packed = pack(groups(), ADVANTAGES, max_tokens=16, skip_flat=True)
    sums = Sums()
    update(run, Experience(groups(), [Packed(packed, len(packed))], ADVANTAGES, ADVANTAGES), sums, Clock())
    return sums


def test_the_update_is_the_same_in_smaller_batches(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected, ours = run_of(folder), run_of(folder)
    sums = [learn(expected, room=99)]
    with caplog.at_level(logging.INFO, logger="grpo"):
        sums.append(learn(ours, room=8))
    assert ours.collector.limits() == {"tokens_per_batch": 8}
    assert "out of memory in the update: tokens_per_batch is 8 instead of 16" in caplog.text
    for name in ("loss", "entropy", "mismatch", "grad_norm", "tokens_trained"):
        assert sums[1].total(name) == pytest.approx(sums[0].total(name), rel=1e-5), name
    for name, weight in weights(expected).items():
        assert torch.allclose(weight, weights(ours)[name], atol=1e-5), name


def test_a_completion_that_does_not_fit_ends_the_run(folder: Path) -> None:
    """The longest prompt and completion have 5 tokens: 16, 8 and 5 are tried."""
    run = run_of(folder)
    before = weights(run)
    with pytest.raises(torch.OutOfMemoryError):
        learn(run, room=3)
    assert run.collector.tokens_per_batch == 5
    assert all(torch.equal(weight, before[name]) for name, weight in weights(run).items())


def test_before_that_the_sampler_frees_its_memory(folder: Path) -> None:
    expected, ours = run_of(folder), run_of(folder)
    sums = [learn(expected, room=99), learn(ours, room=3, freed=2)]
    assert ours.collector.tokens_per_batch == 5
    assert sums[1].total("loss") == pytest.approx(sums[0].total("loss"), rel=1e-5)
    for name, weight in weights(expected).items():
        assert torch.allclose(weight, weights(ours)[name], atol=1e-5), name


def test_a_later_iteration_keeps_the_logprobs_of_the_first(folder: Path) -> None:
    """Memory runs out in the second iteration, after an optimizer step has changed the policy."""
    expected, ours = (run_of(folder, num_iterations=2, beta=0.1) for _ in range(2))
    for run in (expected, ours):
        learn(run, room=99)  # the learning rate of the first step is 0
    sums = [learn(expected, room=99)]
    sums.append(learn(ours, room=8, calls=1))
    assert ours.collector.tokens_per_batch == 8
    for name in ("loss", "kl", "clipped", "entropy", "mismatch", "grad_norm", "tokens_trained"):
        assert sums[1].total(name) == pytest.approx(sums[0].total(name), rel=1e-4, abs=1e-6), name
    for name, weight in weights(expected).items():
        assert torch.allclose(weight, weights(ours)[name], atol=1e-5), name


def test_values_of_tokens_follow_their_completions() -> None:
    """Each value is 100 x completion + place. Padding has no completion of its own."""
    before, after = (pack(groups(), ADVANTAGES, max_tokens=room) for room in (16, 8))
    assert (len(before), len(after)) == (1, 2)

    def values(batch: PackedBatch) -> torch.Tensor:
        pairs = zip(batch.completion_S.tolist(), batch.lengths_S.tolist(), strict=True)
        return torch.cat([100.0 * source + torch.arange(length) for source, length in pairs])

    found = regroup([values(batch) for batch in before], before, [*after, before[0]], real=2)
    for mine, batch in zip(found, after, strict=False):
        assert torch.equal(mine, values(batch))
    assert torch.equal(found[2], torch.zeros(10))
    assert regroup([None], before, after, real=2) == [None, None]


def test_all_ranks_start_again_if_one_of_them_has_no_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank, which this test stands in for, reports an error after its first attempt."""
    answers, asked = iter([True]), []

    def largest(accelerator: object, value: int) -> int:
        asked.append(value)
        return max(value, next(answers, False)) if isinstance(value, bool) else value

    monkeypatch.setattr("grpo.runtime.distributed.max_over_ranks", largest)
    run = run_of(folder)
    learn(run, room=99)
    assert run.collector.tokens_per_batch == 8
    assert asked[:2] == [False, False]  # this rank was fine both times


def test_who_survives(folder: Path) -> None:
    policy, error = run_of(folder).policy, torch.OutOfMemoryError("CUDA out of memory")
    assert policy.survives(error) and policy.survives(OutOfMemoryElsewhere())
    assert not policy.survives(RuntimeError("CUDA error: device-side assert triggered"))
    one, two = (SimpleNamespace(num_processes=count) for count in (1, 2))
    assert DistributedDataParallel(two).survives_out_of_memory  # type: ignore[arg-type]
    assert Zero2(one).survives_out_of_memory and not Zero2(two).survives_out_of_memory  # type: ignore[arg-type]


def test_sampling_is_the_same_with_fewer_slots(caplog: pytest.LogCaptureFixture) -> None:
    prompts, plan = [Prompt(draw, "", (3 + draw, 5, 7)) for draw in range(3)], SamplingPlan(4, 12, 1.0, seed=7)
    model, early = tiny_model(), list[Group]()
    expected, ours = (
        build_engine("native", model, CharTokenizer(), slots=8, uses_packed_attention=True) for _ in range(2)
    )
    wanted = expected.generate(prompts, plan)
    step, counted = ours._step, 0  # type: ignore[attr-defined]

    def limited(active: int, *rest: Any) -> None:
        nonlocal counted
        counted += 1
        if active > 4 and counted > 6:  # in the middle, when some groups may be complete
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        step(active, *rest)

    ours._step = limited  # type: ignore[attr-defined]
    with caplog.at_level(logging.INFO, logger="grpo"):
        found = ours.generate(prompts, plan, early.append)
    assert [[c.token_ids for c in g.completions] for g in found] == [
        [c.token_ids for c in g.completions] for g in wanted
    ]
    assert sorted(group.prompt.draw for group in early) == [0, 1, 2]  # each once
    assert ours.state_dict() == {"slots": 4} and "rollout.slots is 4 instead of 8" in caplog.text
    expected.load_state_dict({"slots": 4})
    assert expected.state_dict() == {"slots": 4}


def replay_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engines on a CPU take the path of CUDA graphs. Their steps run as they are."""
    monkeypatch.setattr("grpo.rollout.native_engine.schedule_for", lambda device: Schedule(16, True))

    def run(self: StepGraphs, key: Hashable, step: Callable[[], None], *_: object) -> bool:
        self._graphs[key] = step  # type: ignore[assignment]
        step()
        return True

    monkeypatch.setattr(StepGraphs, "run", run)


def test_memory_is_given_up_and_taken_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    prompts, plan = [Prompt(draw, "", (3 + draw, 5, 7)) for draw in range(3)], SamplingPlan(4, 40, 1.0, seed=7)
    model = tiny_model()

    def engine() -> Any:
        return build_engine("native", model, CharTokenizer(), slots=5, uses_packed_attention=True)

    without_graphs = engine().generate(prompts, plan)
    replay_without_a_gpu(monkeypatch)
    ours = engine()
    assert not ours.give_up_memory()  # nothing was sampled yet
    wanted = ours.generate(prompts, plan)
    for found, plain in zip(wanted, without_graphs, strict=True):  # finished rows stay in: products of other shapes
        for mine, theirs in zip(found.completions, plain.completions, strict=True):
            assert mine.token_ids == theirs.token_ids
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
    ours.free_memory()
    assert ours._kept is not None and ours.graphs._graphs and ours.backbone.decoder.layers
    with caplog.at_level(logging.INFO, logger="grpo"):
        assert ours.give_up_memory()
    assert "the KV cache is freed before each update from now on" in caplog.text
    for _ in range(2):
        assert ours._kept is None and not ours.graphs._graphs and not ours.backbone.decoder.layers
        assert not ours.give_up_memory()
        assert ours.generate(prompts, plan) == wanted
        ours.free_memory()
    resumed = engine()
    resumed.load_state_dict(ours.state_dict())
    assert resumed.gives_up_memory and ours.state_dict() == {"slots": 5, "gives_up_memory": 1}


def test_memory_is_not_taken_from_a_sampler_that_samples_ahead() -> None:
    engine = SimpleNamespace(give_up_memory=lambda: True)
    parts = (engine, SamplingPlan(1, 1, 1.0, 0), Accelerator(cpu=True))
    ahead, now = (AsyncSampler(*parts, staleness=staleness, steps_left=1) for staleness in (1, 0))  # type: ignore[arg-type]
    assert now.give_up_memory() and not ahead.give_up_memory()
    ahead.close()


def test_sampling_that_never_fits_raises() -> None:
    engine = build_engine("native", tiny_model(), CharTokenizer(), slots=4, uses_packed_attention=True)

    def never(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    engine._step = never  # type: ignore[attr-defined]
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate([Prompt(0, "", (3, 5))], SamplingPlan(4, 12, 1.0, seed=7))
    assert engine.state_dict() == {"slots": 1}


def test_the_transformers_engine_samples_fewer_at_a_time(caplog: pytest.LogCaptureFixture) -> None:
    prompts, plan, model = (
        [Prompt(draw, "", (3 + draw, 5, 7)) for draw in range(2)],
        SamplingPlan(6, 8, 1.0, 7),
        tiny_model(),
    )
    expected, ours = (
        build_engine("transformers", model, CharTokenizer(), slots=8, uses_packed_attention=True) for _ in range(2)
    )
    wanted = expected.generate(prompts, plan)

    def limited(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    hook = model.get_output_embeddings().register_forward_pre_hook(limited)
    with caplog.at_level(logging.INFO, logger="grpo"):
        found = ours.generate(prompts, plan)
    hook.remove()
    assert [[c.token_ids for c in g.completions] for g in found] == [
        [c.token_ids for c in g.completions] for g in wanted
    ]
    assert ours.state_dict() == {"slots": 1} and "rollout.slots is 3 instead of 8" in caplog.text


def test_a_limit_holds_until_its_key_is_changed() -> None:
    saved = {"tokens_per_batch": 64, "rollout.slots": 8}
    config = Config(tokens_per_batch=64, rollout=RolloutConfig(slots=16))
    assert _is_unchanged("tokens_per_batch", saved, config) and not _is_unchanged("slots", saved, config)
    assert _is_unchanged("gives_up_memory", saved, config)
