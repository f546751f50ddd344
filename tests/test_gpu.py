"""Training and sampling on a GPU: pytest -m gpu, on a machine that has one. No test here was run on a GPU yet."""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.config.schema import LoraConfig
from grpo.kernels import registry
from grpo.kernels.attention import PackedLayout
from grpo.kernels.cuda.graphs import StepGraphs
from grpo.kernels.head import IDENTITY
from grpo.models.loading import prepare_model
from grpo.models.logprob_model import LogprobModel, use_grpo_attention
from grpo.models.lora import add_adapter
from grpo.models.reference import FrozenReference
from grpo.models.weights import WeightReader, WorkingCopy
from grpo.packing import pack
from grpo.rollout.backbones import KernelBackbone, ModuleBackbone
from grpo.rollout.engine import build_engine
from grpo.runtime.timing import Clock
from grpo.types import Group, Prompt, SamplingPlan
from tests.fakes import CharTokenizer, tiny_folder
from tests.fakes import tiny_model as model_on_a_cpu
from tests.models.test_lora_16bit import STEP, arrived, sampled_logprobs, take_step
from tests.models.test_shared_prompt import NARROW, batches_of, learned
from tests.models.zoo import tiny_zoo_model
from tests.runtime.test_distributed import ROOT, launch, profile
from tests.test_trainer import arguments

pytestmark = pytest.mark.gpu
GPU = "cuda:0"
SINGLE, SINGLE_FP16 = profile("single_gpu"), profile("single_gpu_fp16")
PROMPTS = [Prompt(draw, "", tuple(range(3 + draw, 9 + 2 * draw))) for draw in range(6)]


def tiny_model(*args: Any, **changes: Any) -> Any:
    """A random model on the GPU."""
    model: Any = model_on_a_cpu(*args, **changes)
    return model.to(GPU)


def native(model: Any, **settings: Any) -> Any:
    tokenizer: Any = CharTokenizer()
    return build_engine("native", model, tokenizer, **{"slots": 16, "uses_packed_attention": True} | settings)


@pytest.fixture(autouse=True)
def nothing_failed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    monkeypatch.setattr(registry, "_failed", {})
    yield registry._failed
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("gpu")
    arguments(place, "none")
    tiny_folder(place / "model", hidden_size=128, head_dim=32)
    return place


def trained(place: Path, name: str, launcher: list[str], script: str = "launch/train.py", **changes: Any) -> list[dict]:
    """Train in place/name. Return the metrics of each step."""
    done = subprocess.run(
        [*launcher, "--main_process_port", "0", str(ROOT / script), *arguments(place, name, **changes)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (place / name / "output.txt").write_text(done.stdout + done.stderr)
    return [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("launcher", "changes"),
    [
        (SINGLE, {}),
        (SINGLE, {"lora.r": 4, "optimizer.learning_rate": 0.02}),
        (SINGLE, {"rollout.max_staleness": 1}),
        (SINGLE, {"rollout.engine": "transformers", "model.attn_implementation": "sdpa"}),
        (SINGLE, {"model.reference_offload": True, "model.gradient_checkpointing": True}),
        (SINGLE_FP16, {}),
    ],
    ids=["bfloat16", "lora", "ahead", "transformers", "offloaded", "float16"],
)
def test_a_run_ends_with_finite_numbers(
    place: Path, launcher: list[str], changes: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    rows = trained(place, name, launcher, **changes)
    learned = [row for row in rows if "policy/loss" in row]
    assert len(learned) == 4 and all(row["policy/grad_norm"] > 0 for row in learned)
    assert max(row["policy/sampling_logprob_difference"] for row in learned[: 1 if name == "ahead" else None]) < 2e-2
    output = (place / name / "output.txt").read_text()
    assert "kernels: " in output and "differs" not in output


def test_a_run_learns(place: Path) -> None:
    changes = {"steps": 30, "optimizer.learning_rate": 0.01, "eval_every": 0, "save_every": 0, "objective.beta": 0}
    rewards = [row["reward/mean"] for row in trained(place, "learns", SINGLE, **changes) if "reward/mean" in row]
    assert len(rewards) == 30 and sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


def test_a_stopped_run_goes_on(place: Path) -> None:
    whole = trained(place, "whole", SINGLE)
    trained(place, "part", SINGLE, steps=2)
    resumed = trained(place, "part", SINGLE, resume="auto")
    for first, second in zip(whole, resumed, strict=True):
        assert second.get("policy/loss", 0) == pytest.approx(first.get("policy/loss", 0), abs=1e-2)


@pytest.mark.parametrize("where", ["forward:60", "backward:60"])
def test_out_of_memory_in_an_update(place: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OOM", f"0:{where}")
    name = where.replace(":", "-")
    rows = trained(place, name, SINGLE, "tests/out_of_memory_train.py", tokens_per_batch=120)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert "tokens_per_batch is 60 instead of 120" in (place / name / "output.txt").read_text()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["multi_gpu", "fsdp2"])
def test_out_of_memory_on_one_of_two_gpus(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OOM", "1:backward:32")
    found = launch(place, name, profile(name, "--num_processes", "2"), "tests/out_of_memory_train.py")
    assert found.code == 0, found.stderr[-3000:]
    assert "tokens_per_batch is 32 instead of 64" in found.output


def test_sampling_without_memory_goes_on_with_fewer_slots() -> None:
    """The limit of the process leaves room for about half of the keys and values."""
    model, plan = tiny_model(hidden_size=256, num_hidden_layers=8), SamplingPlan(64, 512, 1.0, seed=1)
    expected, ours = (native(model, slots=384, cache_gib=8.0) for _ in range(2))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    wanted = expected.generate(PROMPTS, plan)
    used = torch.cuda.max_memory_allocated()
    expected._kept = None  # type: ignore[attr-defined]
    expected.graphs.clear()  # type: ignore[attr-defined]
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.6 * used / total)
    found = ours.generate(PROMPTS, plan)
    assert ours.state_dict()["slots"] < 384
    assert lengths(found) == lengths(wanted)


def lengths(groups: list[Group]) -> list[list[int]]:
    return [[len(completion.token_ids) for completion in group.completions] for group in groups]


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_the_sampler_draws_from_the_trained_policy(family: str) -> None:
    model = tiny_model(family)
    engine = native(model)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        groups = engine.generate(PROMPTS, SamplingPlan(4, 40, 1.0, seed=1))
        [batch] = pack(groups, torch.zeros(len(PROMPTS), 4), max_tokens=10**6)
        with torch.no_grad():
            logprobs = LogprobModel(model, uses_packed_attention=True, temperature=1.0)(batch.to(torch.device(GPU)))[0]
    assert float((logprobs.cpu() - batch.sampling_logprobs_N).abs().mean()) < 2e-2


def test_tokens_of_a_window_are_sampled_without_waiting() -> None:
    model = tiny_model()
    engine: Any = native(model)
    plan, decode = SamplingPlan(2, 60, 1.0, seed=1), engine._decode
    engine.generate(PROMPTS, plan)  # captures the graphs

    def watched(*args: Any) -> int:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return decode(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine._decode = watched
    engine.generate(PROMPTS, plan)


def assert_same_samples(found: list[Group], wanted: list[Group]) -> None:
    """Other shapes round differently in float32, so that a draw at the boundary of two tokens may go the other way."""
    pairs = [
        pair for a, b in zip(found, wanted, strict=True) for pair in zip(a.completions, b.completions, strict=True)
    ]
    same = [(a, b) for a, b in pairs if a.token_ids == b.token_ids]
    assert len(same) >= 0.9 * len(pairs)
    for a, b in same:
        assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-3)


def without_graphs(self: StepGraphs, key: Hashable, step: Callable[[], None], *_: object) -> bool:
    step()
    return True


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_native_equals_transformers(temperature: float) -> None:
    model, plan, tokenizer = tiny_model(), SamplingPlan(4, 40, temperature, seed=7), CharTokenizer()
    oracle = build_engine("transformers", model, tokenizer, slots=16, uses_packed_attention=True)
    assert_same_samples(native(model).generate(PROMPTS, plan), oracle.generate(PROMPTS, plan))


def test_graphs_sample_what_steps_without_them_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with new weights under graphs that were captured with others, and with a queue."""
    model, plan = tiny_model(), SamplingPlan(4, 40, 1.0, seed=7)
    engine, waiting = native(model, slots=32), native(model, slots=5)
    engine.generate(PROMPTS, plan)
    captured = len(engine.graphs._graphs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    replayed = engine.generate(PROMPTS, plan)
    assert 0 < captured <= len(engine.graphs._graphs)
    assert_same_samples(waiting.generate(PROMPTS, plan), replayed)
    monkeypatch.setattr(StepGraphs, "run", without_graphs)
    assert_same_samples(native(model, slots=32).generate(PROMPTS, plan), replayed)


def test_an_engine_stops_growing_and_gives_its_memory_up() -> None:
    engine, plan = native(tiny_model(hidden_size=256), step_completions=24), SamplingPlan(4, 60, 1.0, seed=1)
    wanted = engine.generate(PROMPTS, plan)
    size = engine._kept[0].bytes
    many = [Prompt(draw, "", tuple(range(3, 5 + draw % 9))) for draw in range(100)]
    held = []
    for _ in range(4):
        engine.generate(many, SamplingPlan(1, 60, 0.0, seed=1))
        engine.generate(PROMPTS, plan)
        held.append(torch.cuda.memory_allocated())
    assert engine._kept[0].bytes == size and held[-1] <= held[0] + 2**20
    assert engine.give_up_memory()
    assert torch.cuda.memory_allocated() <= held[-1] - size
    assert_same_samples(engine.generate(PROMPTS, plan), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shared_prompts(dtype: torch.dtype) -> None:
    """A group whose prompt is computed once for two batches has the logprobs and gradients of an unsplit one."""
    model, results = tiny_model("qwen2"), []
    for max_tokens, share in ((10**6, False), (NARROW, True)):
        batches = [batch.to(torch.device(GPU)) for batch in batches_of(max_tokens, share)]
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            results.append(learned(LogprobModel(model, uses_packed_attention=True, temperature=1.0), batches))
    (whole, expected), (split, gradients) = results
    close = 1e-4 if dtype == torch.float32 else 5e-2
    assert float((split - whole).abs().mean()) < close and gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((gradients[name] - gradient).norm()) <= close * max(1.0, float(gradient.norm())), name


def test_a_clock_reads_the_time_of_the_device() -> None:
    device = torch.device(GPU)
    numbers = torch.ones(4096, 4096, device=device)
    torch.cuda.synchronize()
    clock = Clock(device)
    for _ in range(50):
        numbers = (numbers @ numbers).clamp_(max=1)
    clock.lap("products")
    launched = time.perf_counter()
    torch.cuda.synchronize()
    waited = time.perf_counter() - launched
    assert clock.laps["products"] > 0.5 * waited


def test_an_offloaded_reference_waits_in_pinned_memory() -> None:
    model = tiny_model()
    batch = batches_of(10**6)[0].to(torch.device(GPU))
    plain = LogprobModel(model, uses_packed_attention=True, temperature=1.0)
    expected = FrozenReference(plain, torch.device(GPU)).logprobs([batch])[0]
    offloaded = FrozenReference(plain, torch.device(GPU), offload=True)
    for _ in range(2):
        assert all(parameter.is_pinned() for parameter in model.parameters())
        assert torch.equal(offloaded.logprobs([batch])[0], expected)


class Products(TorchDispatchMode):
    """Counts matrix products by the dtype of their inputs."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.operations = [getattr(torch.ops.aten, name) for name in names]
        self.dtypes: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in self.operations:
            self.dtypes[args[1].dtype] += 1  # the last argument may be the dtype of the result
        return func(*args, **(kwargs or {}))


def test_an_update_multiplies_in_16_bits_and_packs_attention_in_one_call() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    model = tiny_model(vocab_size=512)
    engine = native(model)
    groups = engine.generate(PROMPTS, SamplingPlan(4, 40, 1.0, seed=1))
    batch = pack(groups, torch.zeros(len(PROMPTS), 4), max_tokens=10**6)[0].to(torch.device(GPU))
    assert PackedLayout(batch.spans, torch.device(GPU)).uses_varlen
    with Products("mm", "addmm", "bmm") as products, torch.autocast("cuda", dtype=torch.bfloat16):
        LogprobModel(model, uses_packed_attention=True, temperature=1.0)(batch)[0].sum().backward()
    assert products.dtypes[torch.bfloat16] > 20 and products.dtypes[torch.float32] == 0


def test_experts_are_sampled_in_graphs_and_trained_in_16_bits(nothing_failed: dict[str, str]) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    live: Any = prepare_model(tiny_zoo_model("qwen3_moe"), IDENTITY)
    assert use_grpo_attention(live)
    live.to(GPU)
    copy = WorkingCopy(live, WeightReader())
    copy.bind(live, torch.device(GPU), compute_dtype=torch.bfloat16)
    copy.refresh()
    with Products("_grouped_mm") as products, torch.autocast("cuda", dtype=torch.bfloat16):
        engine = native(copy.model)
        groups = engine.generate(PROMPTS, SamplingPlan(4, 40, 1.0, seed=1))
        [batch] = pack(groups, torch.zeros(len(PROMPTS), 4), max_tokens=10**6)
        logprobs = LogprobModel(live, uses_packed_attention=True, temperature=1.0)(batch.to(torch.device(GPU)))[0]
        logprobs.sum().backward()
    assert products.dtypes.keys() == {torch.bfloat16}
    assert engine.graphs._graphs and not nothing_failed
    assert float((logprobs.detach().cpu() - batch.sampling_logprobs_N).abs().mean()) < 1e-1


@pytest.mark.parametrize("kind", ["kernels", "modules"])
def test_a_small_step_of_an_adapter_reaches_the_sampler(kind: str) -> None:
    from grpo.kernels.decode import FusedDecoder

    live = tiny_model(spread=2.0, hidden_size=64)
    for parameter in live.parameters():
        parameter.data = parameter.data.bfloat16().float()
    copy = WorkingCopy(live, WeightReader())
    for model in (live, copy.model):
        add_adapter(model, LoraConfig(r=4, lora_alpha=8), base="")
    copy.model.eval()
    copy.bind(live, torch.device(GPU), compute_dtype=torch.bfloat16)
    backbone = ModuleBackbone(copy.model) if kind == "modules" else KernelBackbone(copy.model, FusedDecoder())

    def sampler() -> Tensor:
        copy.refresh()
        return sampled_logprobs(backbone, torch.bfloat16, GPU)

    before, exact_before = sampler(), sampled_logprobs(ModuleBackbone(live), torch.float32, GPU)
    take_step(live, STEP)
    exact = sampled_logprobs(ModuleBackbone(live), torch.float32, GPU) - exact_before
    assert 0.99 < arrived(exact, sampler() - before) < 1.01


def test_the_doctor_ends_with_code_0() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "launch/doctor.py"), "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_cudnn_attention_is_off() -> None:
    from grpo.runtime.device import configure

    configure(torch.device(GPU))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
