"""Two ranks of FSDP2 train for a step, write a checkpoint and load it in new policies.

Arguments: model folder, result stem. Writes STEM-RANK.json with the measurements of each rank.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy

from grpo.config.schema import LoraConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from grpo.models.logprob_model import probe_batch
from grpo.models.optimizer_state import Tensors
from grpo.models.strategies.registry import start_accelerator
from grpo.policy import Policy
from grpo.run.checkpoint import load_checkpoint, save_checkpoint
from grpo.run.checkpointer import read_checkpoint
from tests.sharded_load import Peak


def made(accelerator: Accelerator, folder: str, lora: LoraConfig | None) -> Policy:
    """Return a policy with a synced reference: the model of the config, because LoRA needs another model for it."""
    torch.manual_seed(0)
    config = ModelConfig(reference=folder, sync_ref_model=True, ref_model_sync_steps=1)
    parts = (config, ObjectiveConfig(), OptimizerConfig(learning_rate=0.01))
    return Policy(accelerator, folder, *parts, lora, temperature=1.0, optimizer_steps=9)


def whole(tensors: Tensors) -> dict[str, Tensor]:
    return {f"{group}.{name}": value for group, part in tensors.items() for name, value in part.items()}


def sums(policy: Policy) -> float:
    assert policy.reference is not None
    return sum(float(value.double().abs().sum()) for value in policy.reference.model.parameters())


def main(folder: str, result: str) -> None:
    accelerator = start_accelerator()
    seen: dict[str, Any] = {}
    for case, lora in (("full", None), ("lora", LoraConfig(r=4))):
        row = seen[case] = {}
        row["offloaded"] = isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
        policy = made(accelerator, folder, lora)
        fresh = whole(policy.state_dict()[0])
        batch = probe_batch(policy.model.config.vocab_size)
        with policy.accumulate(sync=True):
            policy.backward(policy.logprobs(batch)[0].sum())
        policy.step()
        policy.sync_reference(1)
        tensors, state = policy.state_dict()
        path = Path(f"{result}-{case}") / "checkpoints" / "step-1"
        if accelerator.is_main_process:
            save_checkpoint(path.parent.parent, 1, tensors, state, keep=1)
        accelerator.wait_for_everyone()
        row["reference saved"] = sums(policy)
        del policy, tensors
        policy = made(accelerator, folder, lora)
        with Peak(files=True) as peak:  # that is how safetensors are read
            tensors, state = read_checkpoint(path, policy)
            row["read"] = sum(value.nbytes for value in whole(tensors).values())
            policy.load_state_dict(tensors, state)
            del tensors
        row["peak"] = peak.bytes
        row["reference"] = sums(policy)
        now = whole(policy.state_dict()[0])
        if accelerator.is_main_process:
            saved = whole(load_checkpoint(path)[0])
            row["checkpoint"] = sum(value.nbytes for value in saved.values())
            row["tensors"] = len(saved)
            row["equal"] = sum(torch.equal(now[name], value) for name, value in saved.items())
            row["moved"] = sum(not torch.equal(saved[name], value) for name, value in fresh.items())
        del policy, now, fresh
    Path(f"{result}-{accelerator.process_index}.json").write_text(json.dumps(seen))
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
