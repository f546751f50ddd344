"""One optimizer step of a tiny policy on every rank, each with a batch of its own, and its checkpoint loaded again.

Arguments: model folder, result stem, "full", "lora" or "experts". Writes STEM.safetensors, the full weights after
the step, and STEM-RANK.json.
"""

import json
import sys
from dataclasses import replace

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from grpo.config.schema import LoraConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from grpo.models.logprob_model import probe_batch
from grpo.models.strategies.registry import start_accelerator
from grpo.packing import PackedBatch
from grpo.policy import Policy

VOCABULARY = 42
RANKS = 2


def batch_of(rank: int) -> PackedBatch:
    """Return the probe batch with different tokens on each rank."""
    batch = probe_batch(VOCABULARY)
    ids, tokens = ((part + 5 * rank) % VOCABULARY for part in (batch.input_ids_T, batch.tokens_N))
    return replace(batch, input_ids_T=ids, tokens_N=tokens, weights_N=torch.ones_like(batch.weights_N))


def tiny_policy(accelerator: Accelerator, folder: str, case: str) -> Policy:
    """Return a policy with a schedule of 10 steps. An adapter has the same initial weights on every rank."""
    torch.manual_seed(0)
    objective = ObjectiveConfig(router_aux_loss_coef=20.0 if case == "experts" else None)
    parts = (ModelConfig(), objective, OptimizerConfig(learning_rate=0.01, weight_decay=0.1))
    lora = LoraConfig(r=4) if case == "lora" else None
    return Policy(accelerator, folder, *parts, lora, temperature=1.0, optimizer_steps=10)


def learn(policy: Policy, ranks: list[int]) -> float:
    """Take one optimizer step on two passes over the batch of each of `ranks`. Return the gradient norm."""
    passes = [rank for rank in ranks for _ in range(2)]
    batches = [batch_of(rank).to(policy.device) for rank in passes]
    policy.count_expert_load(batches)
    for index, (rank, batch) in enumerate(zip(passes, batches, strict=True)):
        with policy.accumulate(sync=index == len(passes) - 1):
            loss = -policy.logprobs(batch)[0].sum() / (1 + rank)
            policy.backward(loss + policy.router_loss())
    return policy.step()


def full_weights(policy: Policy) -> dict[str, Tensor]:
    """Return copies of all merged weights by plain name. Collective."""
    weights = policy.strategy.full_weights(policy.model)
    return {name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in weights}


def main(folder: str, stem: str, case: str) -> None:
    accelerator = start_accelerator()
    assert accelerator.num_processes == RANKS
    policy = tiny_policy(accelerator, folder, case)
    policy.check()
    mine = [accelerator.process_index]
    norms = [learn(policy, mine)]
    weights = full_weights(policy)
    tensors, state = policy.state_dict()
    tensors = {group: {name: value.clone() for name, value in part.items()} for group, part in tensors.items()}
    norms.append(learn(policy, mine))
    after = full_weights(policy)
    learning_rates = [policy.learning_rate]
    strategy = type(policy.strategy).__name__
    accelerator.free_memory()  # an Accelerator clips the gradients of one model
    again = tiny_policy(accelerator, folder, case)
    again.load_state_dict(tensors if accelerator.is_main_process or not again.broadcasts_checkpoint else {}, state)
    restored = full_weights(again)
    norms.append(learn(again, mine))
    after_again = full_weights(again)
    learning_rates.append(again.learning_rate)
    again.refresh_sampler()
    seen = {
        "strategy": strategy,
        "norms": norms,
        "restored": all(torch.equal(weights[name], value) for name, value in restored.items()),
        "continued": max(float((after[name] - value).abs().max()) for name, value in after_again.items()),
        "sampler": max(
            float((after_again[name] - value).abs().max()) for name, value in again.sampler.named_parameters()
        ),
        "trained": sorted(tensors.get("model", {})),
        "learning_rate": learning_rates,
        "load": again.expert_metrics(),
    }
    with open(f"{stem}-{accelerator.process_index}.json", "w") as file:
        json.dump(seen, file)
    if accelerator.is_main_process:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, f"{stem}.safetensors")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
