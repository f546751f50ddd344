"""GRPOConfig: every field of TRL's, what becomes of it, and TRL's batch arithmetic in values worked out by hand."""

import dataclasses
import enum
from pathlib import Path
from typing import Any

import pytest

from grpo.compat.arguments import GRPOConfig
from grpo.compat.batch import Schedule
from grpo.compat.fields import default_of, outcomes
from grpo.compat.table import page
from grpo.compat.translate import Translation, schedule_of, translate
from grpo.config.schema import Config, flatten, to_dict
from grpo.config.setting import keys_of
from grpo.config.validation import check_config
from grpo.errors import ConfigError

DOCS = Path(__file__).parents[2] / "docs" / "trl.md"
GIVEN = {"model.name": "model", "rewards": {"accuracy": 1.0}, "tokens_per_batch": 8192}


def translated(rows: int | None = 100, **fields: Any) -> Translation:
    return translate(GRPOConfig("out", **fields), rows, GIVEN)


def keys(**fields: Any) -> dict[str, Any]:
    return flatten(to_dict(translated(**fields).config))


def test_the_page_is_made_from_the_code() -> None:
    assert DOCS.read_text(encoding="utf-8") == page(), "python -m grpo.compat.table > docs/trl.md"


def test_every_field_has_an_outcome_and_mapped_ones_name_keys() -> None:
    table = outcomes(GRPOConfig)
    assert len(table) == 191
    known = set(keys_of(Config))
    for name, outcome in table.items():
        assert outcome.kind in ("mapped", "no effect", "refused") and outcome.text, name
        assert not outcome.verbatim or outcome.text in known, name
    assert sum(outcome.verbatim for outcome in table.values()) >= 40


def test_trls_defaults_are_the_defaults() -> None:
    values = keys()
    assert values["objective.beta"] == 0.0 and values["optimizer.learning_rate"] == 1e-6
    assert values["optimizer.lr_scheduler_type"] == "linear" and values["optimizer.optim"] == "adamw_torch_fused"
    assert values["sampling.num_generations"] == 8 and values["sampling.max_completion_length"] == 512
    assert values["sampling.temperature"] == 1.0 and values["objective.loss_type"] == "dapo"
    assert values["objective.scale_rewards"] == "group" and values["objective.epsilon"] == 0.2
    assert values["seed"] == 42 and values["eval_every"] == 0 and values["save_every"] == 500
    assert values["tracking.report_to"] == [] and values["model.gradient_checkpointing"] is True
    assert translated().precision == "bf16" and translated(bf16=False).precision == "no"
    assert translated(fp16=True).precision == "fp16" and translated().remarks == []
    check_config(translated().config)


@pytest.mark.parametrize(
    "field, value",
    [(name, value) for name, value in [("top_p", 0.9), ("min_p", 0.1), ("deepspeed", "x.json"), ("optim_args", "a=1")]],
)
def test_a_refused_field_says_what_to_use_instead(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field} is {value!r}, which is not supported: ") as caught:
        translated(**{field: value})
    assert outcomes(GRPOConfig)[field].text in str(caught.value)


def test_refused_fields_accept_what_asks_for_nothing() -> None:
    translated(fsdp="", min_p=0.0, ddp_backend="gloo", data_seed=42, tf32=False)
    with pytest.raises(ConfigError, match="data_seed is 7"):
        translated(data_seed=7)


def test_fields_without_effect_are_named_in_one_line() -> None:
    assert (
        translated(include_num_input_tokens_seen=False, debug=[]).remarks == []
    )  # what TRL's parser makes of defaults
    [line] = translated(dataloader_num_workers=4, pad_to_multiple_of=8, use_liger_kernel=True).remarks
    assert line.endswith(
        "here: use_liger_kernel, dataloader_num_workers, pad_to_multiple_of (docs/trl.md has the reasons)"
    )


# per_device 4, accumulation 4, one process: 16 completions of 8 = 2 prompts for each optimizer step.
SIZES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_generations": 8}


@pytest.mark.parametrize(
    "fields, world, rows, expected",
    [
        # 100 rows in blocks of 2 prompts: 50 optimizer steps an epoch.
        ({"num_train_epochs": 2.0}, 1, 100, Schedule(2, 1, 1, 100, 100, 50)),
        # 101 rows: the last one, which fills no block, is not trained.
        ({"num_train_epochs": 1.0}, 1, 101, Schedule(2, 1, 1, 50, 50, 50)),
        # two processes: 32 completions = 4 prompts
        ({"num_train_epochs": 1.0}, 2, 100, Schedule(4, 1, 1, 25, 25, 25)),
        # each set of completions twice: 100 optimizer steps an epoch, in 50 steps here
        ({"num_train_epochs": 1.0, "num_iterations": 2}, 1, 100, Schedule(2, 1, 2, 50, 100, 100)),
        # steps_per_generation 8: 32 completions = 4 prompts, in two optimizer steps of 16
        ({"steps_per_generation": 8, "max_steps": 10}, 1, 100, Schedule(4, 2, 1, 5, 10, 50)),
        # generation_batch_size 64 = steps_per_generation 16: 8 prompts, four optimizer steps, three times
        ({"generation_batch_size": 64, "num_iterations": 3, "max_steps": 24}, 1, 100, Schedule(8, 4, 3, 2, 24, 144)),
        # two generation batches of one prompt in one optimizer step
        ({"steps_per_generation": 2, "max_steps": 7}, 1, 100, Schedule(2, 1, 1, 7, 7, 50)),
        # a stream
        ({"max_steps": 5}, 1, None, Schedule(2, 1, 1, 5, 5, None)),
        # 7 optimizer steps of 2 each: 4 steps here, which take 8
        ({"num_iterations": 2, "max_steps": 7}, 1, 100, Schedule(2, 1, 2, 4, 7, 100)),
    ],
)
def test_batch_arithmetic(
    fields: dict, world: int, rows: int | None, expected: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    arguments = GRPOConfig("out", **SIZES, **fields)
    assert schedule_of(arguments, rows) == expected


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"per_device_train_batch_size": 3}, "needs to be a multiple of num_generations 8"),
        ({"generation_batch_size": 12}, "generation_batch_size is 12, needs to be a multiple of per_device"),
        ({"generation_batch_size": 8, "steps_per_generation": 4}, "are both set, and do not agree"),
        ({"num_generations": 1}, "num_generations is 1, needs to be at least 2"),
    ],
)
def test_sizes_that_do_not_divide(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GRPOConfig("out", **fields)


def test_an_optimizer_step_never_mixes_two_policies() -> None:
    with pytest.raises(ConfigError, match="steps_per_generation is 3 and gradient_accumulation_steps 2"):
        translated(gradient_accumulation_steps=2, steps_per_generation=3)
    with pytest.raises(ConfigError, match="set max_steps"):
        translated(rows=None)


def test_steps_that_do_not_divide_are_rounded_up_and_said() -> None:
    made = translated(num_iterations=2, max_steps=7, save_steps=3, eval_strategy="steps", eval_steps=4)
    assert (made.config.steps, made.config.save_every, made.config.eval_every) == (4, 2, 2)
    assert made.remarks[0].endswith("4 steps take 8 optimizer steps, not 7")
    assert made.remarks[1].endswith("every 4 instead") and "save_steps is 3" in made.remarks[1]


def test_warm_up_and_intervals() -> None:
    assert keys(warmup_steps=0.1)["optimizer.warmup_ratio"] == 0.1
    for warmup in (1, 3, 7, 99):
        ratio = keys(warmup_steps=warmup, max_steps=100)["optimizer.warmup_ratio"]
        assert -(-ratio * 100 // 1) == warmup
    assert keys(eval_strategy="epoch", num_train_epochs=2)["eval_every"] == 100  # one prompt a step
    assert keys(save_strategy="no")["save_every"] == 0 and keys(max_steps=50, save_steps=0.1)["save_every"] == 5
    with pytest.raises(ConfigError, match="warmup_steps is 5, but there are 3 optimizer steps"):
        translated(warmup_steps=5, max_steps=3)


def test_model_options_trackers_and_vllm() -> None:
    made = translated(model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "sdpa", "device_map": "auto"})
    assert made.config.model.attn_implementation == "sdpa" and made.config.model.torch_dtype == "float32"
    assert "weights are trained in float32" in made.remarks[0]
    assert keys(model_init_kwargs='{"attn_implementation": "eager"}')["model.attn_implementation"] == "eager"
    plain = {"revision": "main", "device_map": None, "attn_implementation": None, "dtype": None}  # of TRL's ModelConfig
    assert translated(model_init_kwargs=plain).config == translated().config
    with pytest.raises(ConfigError, match="model_init_kwargs has revision 'v1'"):
        translated(model_init_kwargs={"revision": "v1"})
    assert keys(report_to=["wandb", "none"])["tracking.report_to"] == ["wandb"]
    with pytest.raises(ConfigError, match="report_to has 'mlflow'"):
        translated(report_to="mlflow")
    values = keys(use_vllm=True, vllm_mode="server", vllm_importance_sampling_mode="token_truncate")
    assert values["rollout.engine"] == "vllm" and values["rollout.vllm_mode"] == "server"
    assert values["rollout.correction"] == "truncate" and values["rollout.correction_cap"] == 3.0
    assert keys(use_vllm=True, vllm_importance_sampling_correction=False)["rollout.correction"] == "none"


def test_evaluations_and_the_best_model() -> None:
    values = keys(num_generations=4, temperature=0.7)
    assert (values["evaluation.num_generations"], values["evaluation.temperature"]) == (4, 0.7)
    values = keys(num_generations_eval=1, load_best_model_at_end=True, metric_for_best_model="eval_reward")
    assert values["evaluation.num_generations"] == 1 and values["load_best_model_at_end"] is True
    assert values["metric_for_best_model"] == "eval/reward/accuracy/mean"
    with pytest.raises(ConfigError, match="needs to be one of eval_rewards/accuracy/mean: an evaluation"):
        translated(load_best_model_at_end=True)


def test_a_truth_value_scales_rewards_as_in_trl() -> None:
    assert keys(scale_rewards=True)["objective.scale_rewards"] == "group"
    assert keys(scale_rewards=False)["objective.scale_rewards"] == "none"


@pytest.mark.slow
def test_fields_and_defaults_are_trls() -> None:
    trl = pytest.importorskip("trl", reason='pip install -e ".[benchmark]"')
    theirs = {field.name: field for field in dataclasses.fields(trl.GRPOConfig)}
    ours = {field.name: field for field in dataclasses.fields(GRPOConfig)}
    assert list(ours) == list(theirs)
    for name, field in theirs.items():
        default = default_of(field)
        assert default_of(ours[name]) == (default.value if isinstance(default, enum.Enum) else default), name


@pytest.mark.slow
def test_derived_sizes_are_trls(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason='pip install -e ".[benchmark]"')
    for fields in [
        {},
        SIZES,
        {**SIZES, "steps_per_generation": 8},
        {**SIZES, "generation_batch_size": 64},
        {"gradient_accumulation_steps": 2, "num_generations": 4},
    ]:
        theirs = trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **fields)
        ours = GRPOConfig(str(tmp_path), **fields)
        for name in ("generation_batch_size", "steps_per_generation"):
            assert getattr(ours, name) == getattr(theirs, name), fields


@pytest.mark.slow
def test_the_command_line_parser_of_transformers_reads_it() -> None:
    from transformers import HfArgumentParser

    [read] = HfArgumentParser(GRPOConfig).parse_args_into_dataclasses(
        ["--output_dir", "out", "--beta", "0.1", "--bf16", "false", "--model_init_kwargs", '{"dtype": "float32"}']
    )
    assert read.beta == 0.1 and read.bf16 is False and read.model_init_kwargs == {"dtype": "float32"}
