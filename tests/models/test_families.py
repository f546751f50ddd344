"""Every family in docs/models.md, as a tiny random model: the trainer's logprobs, gradients, samples and saved folders
are those of the model's own code, or the model is refused with a message that names what works.
"""

import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from grpo.config.schema import LoraConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError
from grpo.kernels.head import IDENTITY, LogitTransform
from grpo.models.architecture import auto_class, head_bias, logit_transform, own_attention
from grpo.models.families import FAMILIES, PACKED, ROWS
from grpo.models.loading import load_model, prepare_model
from grpo.models.logprob_model import LogprobModel, gradient_leak, is_isolated, leak, probe_batch, use_grpo_attention
from grpo.models.lora import lora_layers
from grpo.packing import PackedBatch, pack
from grpo.policy import Policy
from grpo.rollout.engine import build_engine
from grpo.rollout.logprob_mismatch import difference
from tests.fakes import group
from tests.models.zoo import ZOO, tiny_zoo_model, zoo_folder

TEMPERATURE = 0.9
LENGTHS = [(11, [9, 7, 12]), (5, [8, 3])]
"""Prompt and completion lengths. They exceed the windows, chunks and blocks of the tiny models."""


@pytest.fixture(autouse=True)
def fresh_state() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def batch_of() -> PackedBatch:
    torch.manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(2, 40, (length,)).tolist()

    groups = [group(draw, ids(prompt), [ids(n) for n in lengths]) for draw, (prompt, lengths) in enumerate(LENGTHS)]
    [batch] = pack(groups, max_tokens=1000)
    return batch


def policy_of(folder: Path, lora: LoraConfig | None = None, **model: object) -> Policy:
    AcceleratorState._reset_state(reset_partial_state=True)
    policy = Policy(
        Accelerator(cpu=True),
        str(folder),
        ModelConfig(name=str(folder), **model),
        ObjectiveConfig(beta=0.04),
        OptimizerConfig(learning_rate=0.01),
        lora,
        temperature=TEMPERATURE,
        optimizer_steps=10,
    )
    policy.check()
    policy.refresh_sampler()
    return policy


def own_model(folder: Path) -> PreTrainedModel:
    kind = auto_class(AutoConfig.from_pretrained(folder), str(folder))
    loaded: PreTrainedModel = kind.from_pretrained(folder, dtype=torch.float32).eval()
    return loaded


@torch.no_grad()
def own_logprobs(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """The logprobs from the logits that the model returns for plain rows."""
    ids, predictor = batch.rows()
    logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[predictor].float()
    return (logits / TEMPERATURE).log_softmax(-1).gather(1, batch.tokens_N[:, None])[:, 0]


@torch.no_grad()
def logprobs(policy: Policy, batch: PackedBatch) -> Tensor:
    return policy.logprobs(batch)[0]


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return torch.cat([gradient.flatten() for gradient in found])


def learn(policy: Policy, batch: PackedBatch) -> None:
    got = policy.logprobs(batch)[0]
    policy.backward((torch.linspace(-1, 1, len(got)) * got).mean())
    policy.step()
    policy.refresh_sampler()


def check_family(name: str, place: Path) -> str:
    """Run all checks on the tiny model called `name`. Returns "packed", or "rows" for one that is not packed."""
    folder, batch = zoo_folder(name, place / "model"), batch_of()
    tokenizer, own = load_tokenizer(str(folder)), own_model(folder)
    expected = own_logprobs(own, batch)
    policy = policy_of(folder)
    # Forward and backward passes against the model's own code on plain rows.
    assert torch.allclose(logprobs(policy, batch), expected, atol=1e-5), "logprobs"
    own_rows, predictor = batch.rows()
    weights = torch.linspace(-1, 1, len(expected))
    prepare_model(own, IDENTITY)
    logits = own(input_ids=own_rows, use_cache=False).logits.flatten(0, 1)[predictor]
    plain = (logits / TEMPERATURE).log_softmax(-1).gather(1, batch.tokens_N[:, None])[:, 0]
    theirs = gradients(own, plain @ weights)
    ours = gradients(policy.model, policy.logprobs(batch)[0] @ weights)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5, "gradients"
    # Samples.
    engine = build_engine(
        "native" if policy.uses_packed_attention else "transformers",
        policy.sampler,
        tokenizer,
        slots=8,
        uses_packed_attention=policy.uses_packed_attention,
    )
    if name == "minimax":  # padding on the left enters its states: a run is refused at the start (check_agreement)
        assert difference(engine, policy, TEMPERATURE, 12) > 1e-3, "samples"
        return "rows"
    assert difference(engine, policy, TEMPERATURE, 12) < 1e-5, "samples"
    # A step, saved and loaded again.
    learn(policy, batch)
    assert float((logprobs(policy, batch) - expected).abs().max()) > 1e-3, "the step changed nothing"
    policy.save(place / "full" / "final", tokenizer)
    saved = own_model(place / "full" / "final")
    assert torch.allclose(logprobs(policy, batch), own_logprobs(saved, batch), atol=1e-5), "saved"
    assert saved.state_dict().keys() == own_model(folder).state_dict().keys()
    # The same with an adapter, which starts as the model.
    adapted = policy_of(folder, LoraConfig(r=4))
    assert torch.allclose(logprobs(adapted, batch), expected, atol=1e-5), "adapter"
    learn(adapted, batch)
    assert float((logprobs(adapted, batch) - expected).abs().max()) > 1e-3, "the adapter changed nothing"
    merged = LogprobModel(adapted.sampler, uses_packed_attention=adapted.uses_packed_attention, temperature=TEMPERATURE)
    tolerance = 1e-3 if name.startswith("mamba") else 1e-5  # a state over all tokens amplifies rounding
    with torch.no_grad():
        assert torch.allclose(merged(batch)[0], logprobs(adapted, batch), atol=tolerance), "merged"
    adapted.save(place / "lora" / "final", tokenizer)
    saved = own_model(place / "lora" / "final")
    assert torch.allclose(logprobs(adapted, batch), own_logprobs(saved, batch), atol=tolerance), "saved with adapter"
    # Gradient checkpointing, and a bfloat16 base.
    checkpointed = policy_of(folder, gradient_checkpointing=True)
    assert torch.allclose(logprobs(checkpointed, batch), expected, atol=1e-5), "gradient checkpointing"
    learn(checkpointed, batch)
    policy_of(folder, LoraConfig(r=4), torch_dtype="bfloat16")
    return "packed" if policy.uses_packed_attention else "rows"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ZOO if name not in ("gemma2", "qwen3_moe")])
def test_every_family_runs_exactly(name: str, tmp_path: Path) -> None:
    assert check_family(name, tmp_path) == ("packed" if ZOO[name].model_type in PACKED else "rows")


def test_the_page_lists_every_family_that_is_checked() -> None:
    checked = {entry.model_type for entry in ZOO.values()}
    assert checked == PACKED | ROWS.keys() and not PACKED & ROWS.keys()
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (packed|rows) \|", page, re.MULTILINE))
    assert rows == {name: "packed" if name in PACKED else "rows" for name in checked}


def test_the_families_that_people_train_are_checked() -> None:
    wanted = {
        *("llama", "mistral", "ministral3", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_text"),
        *("gemma2", "gemma3", "gemma3_text", "gemma4", "phi3", "smollm3", "olmo2", "olmo3", "granite"),
        *("granitemoehybrid", "lfm2", "falcon_h1", "nemotron_h", "gpt_oss", "glm4", "deepseek_v3", "cohere2"),
        *("exaone4", "ernie4_5", "hunyuan_v1_dense", "stablelm", "starcoder2", "gpt2", "opt", "bamba", "jamba"),
        "mamba2",
    }
    assert wanted <= PACKED | ROWS.keys()
    assert wanted - PACKED == {"gemma2", "gpt_oss", "stablelm"}  # exact with rollout.engine transformers
    assert FAMILIES.keys() <= PACKED


@pytest.mark.parametrize(("name", "way"), [("gemma2", "rows"), ("qwen3_moe", "packed")])
def test_a_family_runs_exactly(name: str, way: str, tmp_path: Path) -> None:
    assert check_family(name, tmp_path) == way


@pytest.mark.parametrize(
    ("name", "transform", "has_bias"),
    [
        ("granite", LogitTransform(0.25), False),
        ("cohere2", LogitTransform(0.25), False),
        ("gemma4_text", LogitTransform(1.0, 5.0), False),
        ("falcon_h1", LogitTransform(0.5), False),
        ("minicpm3", LogitTransform(0.25), False),
        ("phi", IDENTITY, True),
        ("llama", IDENTITY, False),
    ],
)
def test_scale_softcap_and_bias_are_found_and_exact(
    name: str, transform: LogitTransform, has_bias: bool, tmp_path: Path
) -> None:
    model = load_model(str(zoo_folder(name, tmp_path)))
    assert logit_transform(model) == transform
    assert (head_bias(model) is not None) == has_bias
    batch = batch_of()
    with torch.no_grad():
        ours = LogprobModel(model, uses_packed_attention=False, temperature=TEMPERATURE)(batch)[0]
    assert torch.allclose(ours, own_logprobs(own_model(tmp_path), batch), atol=1e-5)


def test_logits_that_are_something_else_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GraniteForCausalLM

    folder, real = zoo_folder("granite", tmp_path), GraniteForCausalLM.forward

    def other(self: PreTrainedModel, *args: object, **settings: object) -> object:
        output = real(self, *args, **settings)
        output.logits = output.logits.sinh()
        return output

    monkeypatch.setattr(GraniteForCausalLM, "forward", other)
    with pytest.raises(ConfigError, match="GraniteForCausalLM does not compute its logits from the last hidden states"):
        load_model(str(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe"])
def test_nothing_flows_between_the_groups_of_attention_models(name: str, dtype: torch.dtype) -> None:
    model = prepare_model(tiny_zoo_model(name).to(dtype), IDENTITY)
    assert use_grpo_attention(model)
    assert leak(model, batch_of()) == 0
    assert gradient_leak(model, batch_of()) == 0


@pytest.mark.parametrize(
    "name", ["qwen3_5_text", "qwen3_next", "lfm2", "falcon_h1", "granitemoehybrid", "nemotron_h", "bamba"]
)
def test_what_flows_between_the_groups_of_hybrids_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As for a recurrent layer that grpo/models/mixers.py does not know: transformers' own forward pass runs.
    monkeypatch.setattr("grpo.models.logprob_model.use_grpo_mixers", lambda model: False)
    model = prepare_model(tiny_zoo_model(name), IDENTITY)
    before = own_attention(model)
    assert not use_grpo_attention(model)
    assert model.config._attn_implementation == before
    model.set_attn_implementation("grpo")
    assert leak(model, batch_of()) > 0
    assert not is_isolated(model, batch_of())


def test_a_layer_that_does_not_pass_its_window_keeps_its_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepare_model(tiny_zoo_model("mistral"), IDENTITY)
    assert use_grpo_attention(model)
    model = prepare_model(tiny_zoo_model("llama"), IDENTITY)
    model.config.sliding_window = 4096  # longer than the probe, and Llama's layers know nothing of it
    assert not use_grpo_attention(model)


def test_dropout_and_router_noise_are_off_under_gradient_checkpointing(tmp_path: Path) -> None:
    for name in ("starcoder2", "phimoe", "opt"):
        folder = zoo_folder(name, tmp_path / name)
        policy = policy_of(folder, gradient_checkpointing=True)
        assert torch.equal(logprobs(policy, batch_of()), logprobs(policy, batch_of()))
        assert torch.allclose(logprobs(policy, batch_of()), own_logprobs(own_model(folder), batch_of()), atol=1e-5)


def test_an_adapter_that_the_forward_pass_does_not_see_is_refused(tmp_path: Path) -> None:
    folder = zoo_folder("mamba", tmp_path)
    assert not {"out_proj", "dt_proj"} & {
        name.split(".")[-1] for name, _ in lora_layers(policy_of(folder, LoraConfig(r=4)).model)
    }
    with pytest.raises(
        ConfigError, match="dt_proj, but merged into the weights the adapter gives logprobs that differ"
    ):
        policy_of(folder, LoraConfig(r=4, target_modules=["dt_proj"]))


def test_the_probe_of_experts_tolerates_the_order_of_sums_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepare_model(tiny_zoo_model("qwen3_moe"), IDENTITY)
    assert use_grpo_attention(model)
    batch = probe_batch(48)
    monkeypatch.setattr("grpo.models.logprob_model.leak", lambda *_: 1e-2)
    assert not is_isolated(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # half a unit in the last place of 4 is 8e-3
        assert is_isolated(model, batch)
    monkeypatch.setattr("grpo.models.logprob_model.leak", lambda *_: 5e-7)
    assert is_isolated(model, batch)
    monkeypatch.setattr("grpo.models.logprob_model.gradient_leak", lambda *_: 1e-12)
    assert not is_isolated(model, batch)
