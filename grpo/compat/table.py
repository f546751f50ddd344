"""docs/trl.md: the table of GRPOConfig's fields and of log names, from the code; and the table of TRL's expectations.

python -m grpo.compat.table > docs/trl.md
"""

from collections import Counter

from grpo.compat.arguments import GRPOConfig
from grpo.compat.expectations import examples, section
from grpo.compat.fields import default_of, outcomes
from grpo.compat.logs import RENAMED

HEAD = """# Scripts for TRL

Change one import, and a script for TRL's GRPOTrainer trains with this trainer:

```python
from grpo import GRPOConfig, GRPOTrainer
```

The constructor, the defaults of the config, the dataset with its column `prompt`, the signature of rewards and the log
names are those of TRL 1.16. `GRPOTrainer` translates its arguments into the config of `launch/train.py` and runs the
same loop. `grpo migrate script.py` writes that config as a file ([below](#migrate)).

## What differs

- **Steps.** `state.global_step`, `max_steps`, `logging_steps`, `save_steps` and `eval_steps` count optimizer steps, as
  in TRL. The run directory (`output_dir`) counts a step for each set of completions: with `num_iterations` 2, its step
  50 is optimizer step 100. Numbers that do not divide are rounded up, with a message. The `trainer_state` of a reward
  counts the steps of the run directory.
- **Files.** `output_dir` is a run directory ([quickstart.md](quickstart.md)): `metrics.jsonl`, `rollouts.jsonl`,
  `checkpoints/step-N/`, and `final/` with the trained model at the end. `save_model()` writes to the same places as in
  TRL. A directory that holds a run is not overwritten: pass `resume_from_checkpoint=True` or another `output_dir`. A
  checkpoint has a `trainer_state.json`: `state.log_history`, `num_tokens` and the best metric go on from there.
- **Weights are float32.** A model in 16 bits is converted, with a message. `bf16=True` (the default, as in TRL)
  computes in bfloat16. A loaded model is trained in place.
- **Evaluation** samples as in TRL (`num_generations_eval` completions at `temperature`), at the start, every
  `eval_steps`, and at the end. There is no `eval_loss`. Keys: `eval_reward`, `eval_rewards/<name>/mean`,
  `eval_completions/mean_length`, `eval_completions/clipped_ratio`, `eval_num_tokens`; of several sets also
  `eval_<set>_reward` and so on.
- **Rewards** that other processes can import run in worker processes with a deadline. Lambdas, closures, functions of
  the script itself and reward models run in the training process, as in TRL. A reward that raises ends the run.
- **Callbacks** get `on_init_end`, `on_train_begin`, `on_epoch_begin`, `on_step_begin`, `on_step_end`, `on_epoch_end`,
  `on_log`, `on_evaluate`, `on_save` and `on_train_end`. They may set `should_log`, `should_evaluate`, `should_save` and
  `should_training_stop`; what is due by the arguments is done in any case. `should_training_stop` that is set in
  `on_save` takes effect after one more step. Not followed: `should_epoch_stop`.
- **A model with an adapter** (`peft.PeftModel`, one LoRA adapter) is trained on. With a `beta`, the reference is the
  adapter as it was given, as in TRL. `trainer.model` is a new `PeftModel` around the same base model.
- **The order of the data** has the same distribution as TRL's, not the same permutation. `shuffle_dataset=False` gives
  the same order: that of the rows.
- **Tools** (`tools`, `max_tool_calling_iterations`) that other processes can import run in worker processes with a
  deadline of 60 seconds; others, and environments, run in the training process, as in TRL. Prompts must be messages. A
  chat template that changes earlier turns stays as it is, and the model goes on from the turns as they were sampled
  (TRL patches known templates). What follows a call is in [tools.md](tools.md).
- **Environments** (`environment_factory`, one or several) are made once and reset often. `reset` must return the same
  text for all completions of a prompt; TRL lets it differ. `get_reward` and rewards with the argument `environments`
  read the object of each completion.
- Not supported: `rollout_func`, images.
"""

LOGS = """## Log names

`state.log_history` and `on_log` have TRL's names only: means since the entry before, every `logging_steps`.
`metrics.jsonl` and the trackers have every step, under the names of [metrics.md](metrics.md) and under TRL's:

| TRL | metrics.md |
|---|---|
"""
MORE_LOGS = [
    ("`loss`", "`policy/loss`, divided by the optimizer steps of the step"),
    ("`kl`, with a `beta`", "`policy/kl`"),
    ("`reward`, `reward_std`", "`reward/mean`, and the sample standard deviation over all completions"),
    ("`rewards/<name>/mean`, `rewards/<name>/std`", "`reward/<name>/mean`, and the sample standard deviation"),
    ("`frac_reward_zero_std`", "share of groups whose rewards are all equal"),
    ("`completions/min_length`, `completions/max_length`", "from `rollouts.jsonl`"),
    ("`completions/mean_terminated_length`, `.../min_...`, `.../max_...`", "of completions that ended by themselves"),
    ("`tools/call_frequency`", "`tools/calls`, divided by the completions"),
    ("`tools/failure_frequency`", "`tools/failures`, divided by `tools/calls`"),
    ("`num_tokens`", "`rollout/tokens`, summed over all steps"),
    ("`epoch`", "optimizer steps divided by those of an epoch"),
]
MIGRATE = """## Migrate

```text
grpo migrate script.py [--output FOLDER]
```

reads a script for TRL without running it, prints what becomes of each argument, and writes `config.yaml` and
`rewards.py`, which `launch/train.py` takes. What cannot be read from the text (a value that is computed, the command
line of a script with `TrlParser`) is named, with the key to set by hand.
"""


def page() -> str:
    """Return docs/trl.md."""
    counts = Counter(outcome.kind for outcome in outcomes(GRPOConfig).values())
    total = sum(counts.values())
    fields = [
        f"## The {total} fields of GRPOConfig",
        "",
        f"{counts['mapped']} are mapped to a key of [config.md](config.md).",
        f"{counts['no effect']} are accepted and have no effect here; a run says once which of them were set.",
        f"{counts['refused']} are refused where they are not at their default, with what to use instead.",
        "",
        "| field | default | | becomes, or reason |",
        "|---|---|---|---|",
        *field_rows(),
        "",
    ]
    logs = [f"| `{theirs}` | `{ours}` |" for ours, theirs in RENAMED.items()]
    logs += [f"| {theirs} | {ours} |" for theirs, ours in MORE_LOGS]
    return "\n".join([HEAD, *fields, LOGS + "\n".join(logs), "", MIGRATE, examples(), section()])


def field_rows() -> list[str]:
    """Return one row of the table for each field."""
    rows, table = [], outcomes(GRPOConfig)
    for name, field in GRPOConfig.__dataclass_fields__.items():
        outcome = table[name]
        text = f"`{outcome.text}`" if outcome.verbatim else outcome.text
        rows.append(f"| `{name}` | `{default_of(field)!r}` | {outcome.kind} | {text} |")
    return rows


if __name__ == "__main__":
    print(page(), end="")
