"""Expectations of the tests of TRL's GRPOTrainer, and the test here for each of them. Part of docs/trl.md."""

from dataclasses import dataclass

VISION = "prompts are text: images are refused"
VLLM = (
    "TRL skips it, since it needs a vLLM server; rollout.engine vllm has tests of its own, tests/rollout/test_vllm.py"
)
CHANGED = "refused: top_p, top_k, min_p, beams and penalties sample from another policy than the one that is trained"


@dataclass(frozen=True)
class Expectation:
    """One test of TRL."""

    name: str
    """Without `test_`."""
    test: str | None
    """The test here; None: it does not apply."""
    reason: str = ""
    """Why it does not apply."""


def _same(test: str, *names: str) -> list[Expectation]:
    return [Expectation(name, test) for name in names]


def _not(reason: str, *names: str) -> list[Expectation]:
    return [Expectation(name, None, reason) for name in names]


EXPECTATIONS: list[Expectation] = [
    *_same("test_only_model_reward_and_data_are_needed", "init_minimal"),
    *_same("test_training_changes_every_weight", "training", "training_different_reward_model"),
    *_same("test_losses", "training_loss_types"),
    *_same(
        "test_evaluation_while_training",
        "training_with_eval",
        "training_with_num_generations_eval",
        "training_eval_on_start",
    ),
    *_same(
        "test_several_passes_and_a_sequence_level_ratio",
        "training_multiple_iterations",
        "training_sequence_importance_sampling",
    ),
    *_same("test_an_adapter_trains_alone", "training_peft_config", "training_peft_with_gradient_checkpointing"),
    *_same(
        "test_several_rewards_of_every_kind_with_weights",
        "training_reward_func_standard",
        "training_multiple_reward_funcs",
        "training_sync_and_async_reward_funcs",
        "training_multiple_reward_funcs_with_None_output",
        "training_multiple_reward_funcs_with_weights",
        "training_multiple_mixed_reward_funcs",
        "training_reward_func_additional_column",
        "training_with_reward_func_accessing_trainer_state",
    ),
    *_same("test_rewards_normalised_before_they_are_summed", "training_normalize_then_sum_aggregation"),
    *_same("test_scaling_of_rewards", "training_scale_rewards"),
    *_same(
        "test_a_reference_with_and_without_sync",
        "training_beta_non_zero",
        "training_with_sync_ref_model",
        "training_with_bias_correction_kl",
    ),
    *_same("test_truncated_completions_alone_change_nothing", "training_with_mask_truncated_completions_all_masked"),
    *_same("tests/test_packing.py", "training_with_mask_truncated_completions"),
    *_same("test_rewards_that_never_apply_are_reported", "warning_raised_all_rewards_none"),
    *_same(
        "test_groups_larger_than_a_micro_batch_double_clip_and_template",
        "training_num_generations_larger_than_batch_size",
        "training_delta_clipping",
        "training_multiple_dataloader_workers",
        "training_with_chat_template_kwargs",
        "training_reward_func_conversational",
    ),
    *_same("test_rows_in_their_own_order", "prepare_input_called_with_correct_data"),
    *_same(
        "test_wrong_numbers_of_tokenizers",
        "mismatched_reward_processing_classes_length",
        "correct_reward_processing_classes_list",
        "single_reward_model_with_single_processing_class",
    ),
    *_same("test_the_head_is_in_float32_in_mixed_precision", "training_with_cast_lm_head_to_fp32"),
    *_same("tests/test_losses.py", "get_sapo_token_loss"),
    *_same("test_an_adapter_that_exists_is_trained_on", "training_peft_model"),
    *_same(
        "test_kernels_of_others_are_not_needed",
        "training_with_transformers_paged",
        "training_with_off_policy_mask_with_liger",
        "training_with_liger_grpo_kernel",
        "training_with_liger_grpo_kernel_and_peft",
    ),
    *_not(
        CHANGED,
        "training_with_additional_generation_kwargs",
        "training_with_generation_kwargs",
    ),
    *_same("tests/compat/test_turns.py", "training_with_tools", "tool_completion_idx_injection"),
    *_not(
        VLLM,
        "training_vllm",
        "training_vllm_and_peft",
        "training_vllm_structured_outputs",
        "training_vllm_importance_sampling_correction",
        "training_vllm_with_additional_generation_kwargs",
    ),
    *_not(
        VISION,
        "training_vlm",
        "training_vlm_beta_non_zero",
        "training_vlm_peft",
        "training_vlm_and_importance_sampling",
        "training_vlm_and_liger",
        "training_vlm_and_vllm",
        "training_vlm_multi_image",
        "vlm_training",
        "vlm_processor_vllm_colocate_mode",
    ),
    *_same("test_entropy_filter_and_off_policy_mask", "training_with_entropy_filter", "training_with_off_policy_mask"),
    *_same(
        "tests/test_losses.py",
        "compute_entropy_mask_0",
        "compute_entropy_mask_1",
        "compute_entropy_mask_lower_threshold",
        "compute_entropy_threshold_0",
        "compute_entropy_threshold_1",
        "compute_entropy_all_masked",
    ),
    *_same("tests/test_losses.py", "get_off_policy_mask", "get_off_policy_mask_padding"),
]


NETWORK = "they need servers or data on the network; tools and environments: tests/compat/test_turns.py"
EXAMPLES: list[tuple[str | None, str, str]] = [
    ("quick_start", "the quick start in TRL's documentation", "defaults only"),
    ("rewards", "its custom rewards", "token ids, pattern, reference column, coroutine, one reward per task"),
    ("tldr", "`examples/scripts/grpo_tldr.py`", "LoRA on all layers, KL; sampling by the native engine, not vLLM"),
    ("gspo", "`examples/scripts/gspo.py`", "TrlParser, LoRA, GSPO, several optimizer steps per generation, evaluation"),
    ("continuous_batching", "`examples/scripts/grpo_continuous_batching.py`", "TrlParser, LoRA, answers after `####`"),
    ("command_line", "`trl/scripts/grpo.py`", "the installed file itself"),
    (None, "`grpo_agent.py`, `openenv/*`, `nemo_gym/*`, `harbor/*`", NETWORK),
    (None, "`grpo_vlm.py`, `gspo_vlm.py`, `grpo_vqa_gemma3.py`", "images"),
    (None, "`async_grpo*.py`", "another trainer, of trl.experimental"),
]
"""Test in tests/compat/test_examples.py (None: it does not apply), published script, and what it uses or why not."""


def examples() -> str:
    """Return the section of docs/trl.md about TRL's example scripts."""
    rows = [f"| {what} | {'runs: ' if name else 'does not apply: '}{text} |" for name, what, text in EXAMPLES]
    return "\n".join(
        [
            "## TRL's example scripts",
            "",
            "`pytest -m slow tests/compat/test_examples.py` runs scripts that make the same calls as those that TRL",
            "publishes for GRPO, with the import changed, on a tiny model and local data. The last three need TRL.",
            "",
            "| script of TRL | here |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def section() -> str:
    """Return the section of docs/trl.md."""
    applied = [row for row in EXPECTATIONS if row.test is not None]
    rows = [f"| `{row.name}` | {_place(row)} |" for row in EXPECTATIONS]
    return "\n".join(
        [
            "## TRL's own tests",
            "",
            f"TRL's tests of its GRPOTrainer are {len(EXPECTATIONS)} (`test_grpo_trainer.py` in its repository at",
            f"commit 004b40a; its package has no tests). {len(applied)} of them apply here: each has a test of ours,",
            "which passes. Run them with `pytest -m slow tests/compat`.",
            "",
            "| TRL's test | here |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def _place(row: Expectation) -> str:
    if row.test is None:
        return f"does not apply: {row.reason}"
    return row.test if "/" in row.test else f"tests/compat: {row.test}"
