"""launch/train.py that records every collective of this package, with its step, in COLLECTIVES/rank-R.jsonl.

DDP's exchange of gradients does not go through Python and is not recorded.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from grpo.config.parser import load_config
from grpo.run.records import Recorder
from grpo.runtime.command import run_main

KINDS = (
    "all_reduce",
    "all_gather",
    "all_gather_object",
    "broadcast",
    "broadcast_object_list",
    "gather_object",
    "barrier",
)


def main() -> None:
    log = (Path(os.environ["COLLECTIVES"]) / f"rank-{os.environ['RANK']}.jsonl").open("w")
    step, inside = 0, False

    def counted(kind: str) -> Any:
        real = getattr(torch.distributed, kind)

        def collective(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:  # all_gather_object is made of all_gathers
                return real(*args, **kwargs)
            numbers = args[0].numel() if isinstance(args[0] if args else None, torch.Tensor) else None
            log.write(json.dumps({"step": step, "kind": kind, "numbers": numbers}) + "\n")
            log.flush()
            inside = True
            try:
                return real(*args, **kwargs)
            finally:
                inside = False

        return collective

    for kind in KINDS:
        setattr(torch.distributed, kind, counted(kind))
    record = Recorder.record

    def recorded(self: Recorder, done: int, *rest: Any) -> None:
        nonlocal step
        record(self, done, *rest)
        step = done + 1

    Recorder.record = recorded  # type: ignore[method-assign]
    from grpo.trainer import train

    train(load_config())


if __name__ == "__main__":
    run_main(main)
