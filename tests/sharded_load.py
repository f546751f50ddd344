"""Two ranks of FSDP2 create the same policy twice: weights read by the main process alone, then by every process.

Arguments: model folder, result stem. Writes STEM-RANK.json with the measurements of each rank.
"""

import gc
import json
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from grpo.config.schema import LoraConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from grpo.models.logprob_model import probe_batch
from grpo.models.strategies.registry import start_accelerator, strategy_for
from grpo.policy import Policy
from grpo.runtime.device import return_freed_memory


class Peak:
    """Measure the peak memory of the block in bytes, above that before it. Mapped files count only with `files`."""

    def __init__(self, *, files: bool = False) -> None:
        self.files = files

    def __enter__(self) -> "Peak":
        gc.collect()
        return_freed_memory(torch.device("cpu"))
        self.process, self.done = psutil.Process(), threading.Event()
        self.start = self.top = self._now()
        self.watcher = threading.Thread(target=self._watch)
        self.watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.watcher.join()

    def _now(self) -> int:
        memory = self.process.memory_info()
        return int(memory.rss - (0 if self.files else memory.shared))

    def _watch(self) -> None:
        while not self.done.wait(0.002):
            self.top = max(self.top, self._now())

    @property
    def bytes(self) -> int:
        return self.top - self.start


def main(folder: str, result: str) -> None:
    accelerator = start_accelerator()
    torch.distributed.all_reduce(torch.ones(1))
    plugin = accelerator.state.fsdp_plugin
    expected = {name: tensor.float() for name, tensor in load_file(f"{folder}/model.safetensors").items()}
    seen: dict[str, Any] = {
        "whole": sum(tensor.nbytes for tensor in expected.values()),
        "asked": plugin.cpu_ram_efficient_loading,
    }
    for once in (True, False):
        plugin.cpu_ram_efficient_loading = once
        row: dict[str, Any] = {}
        strategy = strategy_for(accelerator)
        strategy.configure(ModelConfig(), OptimizerConfig())
        with Peak() as peak:
            model, _ = strategy.load(folder, ModelConfig())
        row["peak of loading"] = peak.bytes
        row["held"] = sum(parameter.nbytes for parameter in model.parameters() if not parameter.is_meta)
        del model
        parts = (ModelConfig(), ObjectiveConfig(beta=0), OptimizerConfig())
        with Peak() as peak:
            policy = Policy(accelerator, folder, *parts, temperature=1.0, optimizer_steps=1, sampled_elsewhere=True)
        row["peak of sharding"] = peak.bytes
        del policy
        for lora in (None, LoraConfig(r=4)):
            torch.manual_seed(0)
            parts = (ModelConfig(), ObjectiveConfig(), OptimizerConfig())
            policy = Policy(accelerator, folder, *parts, lora, temperature=1.0, optimizer_steps=1)
            policy.check()
            policy.refresh_sampler()
            row["reads_once"] = policy.strategy.loads_on_main
            loaded = dict(policy.strategy.full_weights(policy.model))
            row["weights"] = all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
            batch = probe_batch(policy.model.config.vocab_size)
            case = "full" if lora is None else "lora"
            row[case] = policy.logprobs(batch)[0].tolist()
            with torch.no_grad():
                row[f"{case} reference"] = policy.reference_logprobs([batch])[0].tolist()
            row[f"{case} sampler"] = [float(value.sum()) for value in policy.sampler.state_dict().values()]
            buffers = [policy.model, policy.sampler, *([] if lora else [policy.reference.model])]
            row[f"{case} buffers"] = [
                float(value.double().sum()) for part in buffers for _, value in part.named_buffers()
            ]
            del policy, loaded
        seen["once" if once else "everywhere"] = row
    Path(f"{result}-{accelerator.process_index}.json").write_text(json.dumps(seen))
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
