"""Run one script on TRL and on this trainer, the import apart, and compare what both log and the weights at the end.

    python benchmarks/one_import.py [--output docs/results/one_import.json]

The script is benchmarks/one_import_script.py. The run here samples its completions. TRL's run gets the same ones
through its rollout_func, prompt by prompt. Model, rows, rewards, losses, steps and logs are each library's own. All
keys that both log, apart from times, and the weights at the end are compared. Needs: pip install -e ".[benchmark]"
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from shared import character_tokenizer, random_qwen2, script_parser, write_json

from grpo.errors import ConfigError
from grpo.runtime.command import run_main

SCRIPT = Path(__file__).with_name("one_import_script.py")
CHARACTERS = "abcdefghij+="
SHAPE = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
CASES = [
    {"LOSS": loss, "ITERATIONS": iterations}
    for loss in ("dapo", "grpo", "dr_grpo", "sapo")  # bnpo depends on micro-batches in TRL
    for iterations in ("1", "2")
]
OTHER = ("step_time", "num_tokens", "total_flos", "learning_rate", "entropy", "kl", "completions/clipped_ratio")
"""Keys that are not compared: times. The learning rate, which TRL logs after the schedule's step. Entropy and KL, which
are means over tokens here, and means of micro-batch means in TRL. The share and the lengths of completions that ended:
TRL counts those whose last token is a drawn padding token."""
FIRST_OR_LAST = ("grad_norm", "clip_ratio/region_mean")
"""Keys that are of another pass over the completions, where there are several: here of the first one or of all."""


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--output", help="file for the numbers (JSON)")
    options = parser.parse_args()
    rows = [compare(case) for case in CASES]
    for row in rows:
        print(
            f"{row['loss_type']:8} x{row['iterations']}: {row['entries']} entries with {row['keys']} keys, largest "
            f"difference {row['largest']:.1e} ({row['key']}), of the weights {row['weights']:.1e}"
        )
    if options.output:
        write_json(options.output, {"rows": rows})


def compare(case: dict[str, str]) -> dict[str, Any]:
    """Return the largest differences of one case, relative to the larger of 1 and the value."""
    try:
        import trl
    except ImportError as error:
        raise ConfigError('this compares with TRL: pip install -e ".[benchmark]"') from error
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        tokenizer = character_tokenizer(CHARACTERS)
        tokenizer.save_pretrained(model)
        torch.manual_seed(0)
        random_qwen2(len(tokenizer), **SHAPE).save_pretrained(model)
        environment = case | {"MODEL": str(model)}
        with recorded() as completions:
            ours = run_script("grpo", environment | {"OUT": f"{folder}/ours"})
        theirs = run_script("trl", environment | {"OUT": f"{folder}/theirs"}, replaying(trl.GRPOTrainer, completions))
    pairs = list(zip(entries(ours), entries(theirs), strict=True))
    differences: dict[str, float] = {}
    skipped = {*OTHER, *(FIRST_OR_LAST if case["ITERATIONS"] != "1" else ())}
    for mine, other in pairs:
        for key in (mine.keys() & other.keys()) - skipped:
            if "terminated" in key:
                continue
            distance = abs(mine[key] - other[key]) / max(1.0, abs(other[key]))
            differences[key] = max(differences.get(key, 0.0), distance)
    weights = max(
        float((a - b).detach().abs().max())
        for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
    )
    worst = max(differences, key=lambda key: differences[key])
    return {
        "loss_type": case["LOSS"],
        "iterations": int(case["ITERATIONS"]),
        "entries": len(pairs),
        "keys": len(differences),
        "key": worst,
        "largest": differences[worst],
        "loss": differences["loss"],
        "weights": weights,
        "differences": differences,
    }


def entries(trainer: Any) -> list[dict[str, float]]:
    """Return the entries of log_history that are of training steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def run_script(library: str, environment: dict[str, str], trainer: Any = None) -> Any:
    """Run the script with `library` in its import line, and return its trainer."""
    source = SCRIPT.read_text(encoding="utf-8")
    changed = source.replace("from trl import", f"from {library} import")
    assert library == "trl" or changed != source
    os.environ |= environment
    names: dict[str, Any] = {"__name__": "__main__", "__file__": str(SCRIPT)}
    with contextlib.ExitStack() as stack:
        if trainer is not None:
            stack.enter_context(mock.patch("trl.GRPOTrainer", trainer))
        exec(compile(changed, str(SCRIPT), "exec"), names)
    return names["trainer"]


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, list[Any]]]:
    """Record within what the native engine samples: text of a prompt -> its groups, one after the other."""
    from grpo.rollout.native_engine import NativeEngine

    found: dict[str, list[Any]] = {}
    generate = NativeEngine.generate

    def record(self: Any, prompts: Any, plan: Any, finished: Any = None) -> Any:
        groups = generate(self, prompts, plan, finished)
        for group in groups:
            found.setdefault(str(group.prompt.messages), []).append(group)
        return groups

    NativeEngine.generate = record  # type: ignore[method-assign]
    try:
        yield found
    finally:
        NativeEngine.generate = generate  # type: ignore[method-assign]


def replaying(trainer: Any, completions: dict[str, list[Any]]) -> Any:
    """Return a class of TRL's trainer that takes these completions instead of sampling its own."""
    left: dict[str, list[Any]] = {
        prompt: [(group.prompt, completion) for group in groups for completion in group.completions]
        for prompt, groups in completions.items()
    }

    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        taken = [left[prompt].pop(0) for prompt in prompts]
        return {
            "prompt_ids": [list(prompt.token_ids) for prompt, _ in taken],
            "completion_ids": [completion.token_ids for _, completion in taken],
            "logprobs": None,
        }

    class Replaying(trainer):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **given: Any) -> None:
            super().__init__(*arguments, rollout_func=rollouts, **given)

    return Replaying


if __name__ == "__main__":
    run_main(main)
