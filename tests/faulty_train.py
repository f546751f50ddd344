"""launch/train.py with an injected fault.

FAULT="nan:RANK:CALL[:COUNT]" makes the loss of COUNT optimizer steps of one rank NaN, from step CALL on.
FAULT="loop:RANK:CALL" makes that rank loop forever there. Each rank logs in FAULT_LOG/rank-R.jsonl how every
optimizer step changed its weights and moments.
"""

import hashlib
import json
import os
from pathlib import Path

import torch

from grpo.config.parser import load_config
from grpo.policy import Policy
from grpo.runtime.command import run_main


def fingerprint(policy: Policy) -> str:
    digest = hashlib.sha256()
    moments = policy.optimizer.state_dict()["state"]
    for tensor in [
        *policy.model.state_dict().values(),
        *(value for state in moments.values() for value in state.values()),
    ]:
        digest.update(torch.as_tensor(tensor).detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    kind, rank, first, *count = os.environ["FAULT"].split(":")
    mine = os.environ.get("RANK", "0") == rank
    last = int(first) + int(count[0] if count else 1)
    log = Path(os.environ["FAULT_LOG"]) / f"rank-{os.environ.get('RANK', '0')}.jsonl"
    steps = 0
    backward, step = Policy.backward, Policy.step

    def faulty_backward(self: Policy, loss: torch.Tensor) -> None:
        bad = mine and kind == "nan" and int(first) <= steps + 1 < last
        while mine and kind == "loop" and int(first) <= steps + 1:
            pass
        backward(self, loss * float("nan") if bad else loss)

    def logged_step(self: Policy, usable: bool = True) -> float:
        nonlocal steps
        steps += 1
        before = fingerprint(self)
        norm = step(self, usable)
        with log.open("a") as file:
            file.write(json.dumps({"step": steps, "before": before, "after": fingerprint(self)}) + "\n")
        return norm

    Policy.backward, Policy.step = faulty_backward, logged_step  # type: ignore[method-assign]
    from grpo.trainer import train

    train(load_config())


if __name__ == "__main__":
    run_main(main)
