"""Reference policies: frozen, another model, synced, offloaded. Gradient checkpointing changes no number."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from grpo.config.schema import ModelConfig, ObjectiveConfig, OptimizerConfig
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import NumericsError
from grpo.models.loading import load_model
from grpo.models.logprob_model import LogprobModel, probe_batch, use_grpo_attention
from grpo.policy import Policy
from grpo.rollout.engine import build_engine
from grpo.types import Prompt, SamplingPlan
from tests.fakes import tiny_folder

BATCH = probe_batch(42)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model")


def policy_of(folder: Path, **model: object) -> Policy:
    settings = ModelConfig(name=str(folder), **model)  # type: ignore[arg-type]
    rate = OptimizerConfig(learning_rate=0.01)
    objective = ObjectiveConfig(beta=0.04)
    return Policy(Accelerator(cpu=True), str(folder), settings, objective, rate, temperature=1.0, optimizer_steps=10)


def learn(policy: Policy) -> None:
    policy.backward(-policy.logprobs(BATCH)[0].mean())
    policy.step()


def reference(policy: Policy) -> torch.Tensor:
    [logprobs] = policy.reference_logprobs([BATCH])
    assert logprobs is not None
    return logprobs


@pytest.mark.parametrize("offload", [False, True])
def test_a_frozen_copy_stays_where_the_policy_started(folder: Path, offload: bool) -> None:
    policy = policy_of(folder, reference_offload=offload)
    policy.check()  # KL 0 before the first step
    with torch.no_grad():
        start = policy.logprobs(BATCH)[0]
    learn(policy)
    assert torch.equal(reference(policy), start)
    assert not any(parameter.requires_grad for parameter in policy.reference.model.parameters())
    with pytest.raises(NumericsError, match="the KL would not start at 0"):
        policy.check()  # as it would be told, had the policy been loaded wrong


def test_another_checkpoint(tmp_path: Path, folder: Path) -> None:
    other = tiny_folder(tmp_path / "other", seed=1)
    policy = policy_of(folder, reference=str(other))
    alone = load_model(str(other))
    with torch.no_grad():
        expected = LogprobModel(alone, uses_packed_attention=use_grpo_attention(alone), temperature=1.0)(BATCH)[0]
    assert torch.equal(reference(policy), expected)


def test_a_synced_reference_moves_by_alpha_and_is_in_the_checkpoint(folder: Path) -> None:
    """reference <- 0.25 policy + 0.75 reference, every second step."""
    synced = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25}
    policy = policy_of(folder, **synced)
    start = {name: value.clone() for name, value in policy.reference.model.named_parameters()}
    learn(policy)
    policy.sync_reference(1)
    assert all(torch.equal(value, start[name]) for name, value in policy.reference.model.named_parameters())
    policy.sync_reference(2)
    now = dict(policy.model.named_parameters())
    for name, value in policy.reference.model.named_parameters():
        assert torch.allclose(value, 0.25 * now[name] + 0.75 * start[name], atol=1e-6)
    tensors, state = policy.state_dict()
    again = policy_of(folder, **synced)
    again.load_state_dict({name: dict(group) for name, group in tensors.items()}, state)
    assert torch.equal(reference(again), reference(policy))


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_gradient_checkpointing_changes_no_gradient_and_no_token(
    folder: Path, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPO_KERNELS", kernels)
    gradients, drawn = [], []
    for checkpointing in (False, True):
        policy = policy_of(folder, gradient_checkpointing=checkpointing)
        policy.backward(-policy.logprobs(BATCH)[0].mean())
        gradients.append({name: value.grad.clone() for name, value in policy.model.named_parameters()})
        policy.refresh_sampler()
        engine = build_engine(
            "native", policy.sampler, load_tokenizer(str(folder)), slots=4, uses_packed_attention=True
        )
        [group] = engine.generate([Prompt(0, "", (5, 6, 7))], SamplingPlan(4, 12, 1.0, seed=0))
        drawn.append([(completion.token_ids, completion.logprobs) for completion in group.completions])
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-7) for name in gradients[0])
    assert drawn[0] == drawn[1]
