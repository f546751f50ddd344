"""Inject the same faults into TRL, where they can be run. `python benchmarks/reliability_trl.py NAME` runs one."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from shared import script_parser

from grpo.errors import ConfigError
from grpo.runtime.command import run_main

TRL_FAULTS = {
    "window": "resume within a generation window (steps_per_generation 4, stopped after 2 of 4 steps)",
    "boundary": "resume where every step samples again",
    "nan": "all rewards NaN",
    "stdout": "standard output on a full disk, log_completions on",
    "disk": "a checkpoint that does not fit on the disk, save_total_limit 1",
}
OURS = {
    "window": "R1: equal to the bit at every step (a step samples and learns as a whole, num_iterations included)",
    "boundary": "R1: the same",
    "nan": "R8, R9: exit 5, naming the reward and three completions",
    "stdout": "R22: exit 0, the same weights",
    "disk": "R4: a warning, training continues, the older checkpoint stays",
}


def main() -> None:
    """Run one fault and write its outcome to standard error as JSON."""
    parser = script_parser(__doc__)
    parser.add_argument("fault", choices=list(TRL_FAULTS))
    print(json.dumps(trl_fault(parser.parse_args().fault)), file=sys.stderr)


def run_fault(name: str) -> str:
    """Run one fault on TRL in a new process. Return the outcome in words."""
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, __file__, name],
            stdout=full if name == "stdout" else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    last = (result.stderr.strip().splitlines() or [""])[-1]
    try:
        return str(json.loads(last))
    except ValueError:
        return f"exit {result.returncode}: {last[:160]}"


def trl_fault(name: str) -> str:
    """Run one fault in this process. Return the outcome in words."""
    with tempfile.TemporaryDirectory() as folder:
        if name in ("window", "boundary"):
            per_generation = 4 if name == "window" else 1
            whole = trl_train(Path(folder) / "whole", steps_per_generation=per_generation)
            checkpoint = str(Path(folder) / "whole" / "checkpoint-2")
            part = trl_train(Path(folder) / "part", resume=checkpoint, steps_per_generation=per_generation)
            change = max(float((whole[key] - part[key]).abs().max()) for key in whole)
            return f"largest difference of a weight {change:.2g}"
        if name == "nan":
            losses: list[float] = []
            trl_train(Path(folder), reward=lambda completions, **_: [float("nan")] * len(completions), losses=losses)
            return f"finishes, exit 0; losses {losses}"
        if name == "stdout":
            trl_train(Path(folder), log_completions=True)
            sys.stdout.flush()
            return "exit 0"
        try:
            trl_train(Path(folder), save_total_limit=1, full_from=2)
            outcome = "goes on"
        except Exception as error:
            outcome = f"ends with {type(error).__name__}"
        left = sorted(path.name for path in Path(folder).glob("checkpoint-*"))
        whole_ones = [name for name in left if (Path(folder) / name / "trainer_state.json").exists()]
        return f"{outcome}; folders left: {', '.join(left)}; whole: {', '.join(whole_ones) or 'none'}"


def trl_train(
    folder: Path,
    *,
    reward: Any = None,
    resume: str | None = None,
    losses: list[float] | None = None,
    full_from: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train a tiny random model for four steps with TRL's GRPOTrainer. Return its weights."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import trl
    except ImportError as error:
        raise ConfigError('the same faults on TRL need it: pip install -e ".[benchmark]"') from error
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

    words = {word: index for index, word in enumerate(["<end>", "<pad>", *"abcdefghijklmnopqrstuvwxyz"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<pad>", unk_token="a", padding_side="left"
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, bos_token_id=None, eos_token_id=0, pad_token_id=1,
        )
    )  # fmt: skip

    class FullDisk(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, *_: Any, **__: Any) -> None:
            if full_from is not None and state.global_step >= full_from:
                limit_file_size(4000)

    config = trl.GRPOConfig(
        output_dir=str(folder), max_steps=4, save_strategy="steps", save_steps=1, per_device_train_batch_size=4,
        num_generations=4, max_completion_length=6, learning_rate=1e-2, lr_scheduler_type="constant", bf16=False,
        use_cpu=True, gradient_checkpointing=False, logging_steps=1, report_to=[], disable_tqdm=True, seed=0,
        **settings,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": letters} for letters in ("ab", "cd", "ef", "gh", "ij", "kl")]),
        reward_funcs=[reward or (lambda completions, **_: [text.count("a") + len(text) / 10 for text in completions])],
        processing_class=tokenizer,
        callbacks=[FullDisk()],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        limit_file_size(None)
    if losses is not None:
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def limit_file_size(size: int | None) -> None:
    """Make the system refuse writes beyond `size` bytes of a file. None removes the limit."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


if __name__ == "__main__":
    run_main(main)
