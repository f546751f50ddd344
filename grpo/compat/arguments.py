"""GRPOConfig: every field of TRL 1.16's GRPOConfig, with TRL's default, and what becomes of it here.

docs/trl.md shows this file as a table. The batch arithmetic is in grpo/compat/batch.py, the rest of the translation in
grpo/compat/translate.py.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any

from grpo.compat.batch import generation_batch
from grpo.compat.fields import copied, mapped, no_effect, refused
from grpo.runtime.env import env_count

LOADER = "there is no DataLoader: all prompts are tokenised before training"
EVALUATION = "an evaluation samples and scores text, and computes no loss"
LAUNCH = "accelerate decides: accelerate launch --config_file X.yaml"
FSDP = LAUNCH.replace("X.yaml", "accelerate_configs/fsdp2.yaml")
NOT_LOGGED = "metrics.jsonl and rollouts.jsonl hold every step and every completion"
TRUNCATED = "a truncated or changed sampling distribution would bias the importance ratios: leave it out"


@dataclass
class GRPOConfig:
    """Arguments of GRPOTrainer with the names and defaults of TRL 1.16."""

    output_dir: str | None = copied(None, "run_dir")
    per_device_train_batch_size: int = mapped(8, "prompts_per_step, tokens_per_batch")
    num_train_epochs: float = mapped(3.0, "steps")
    max_steps: int = mapped(-1, "steps")
    learning_rate: float = copied(1e-6, "optimizer.learning_rate")
    lr_scheduler_type: str = copied("linear", "optimizer.lr_scheduler_type")
    lr_scheduler_kwargs: dict | str | None = copied(None, "optimizer.lr_scheduler_kwargs")
    warmup_steps: float = mapped(0, "optimizer.warmup_ratio")
    optim: str = copied("adamw_torch_fused", "optimizer.optim")
    optim_args: str | None = refused(None, "pass optimizers=(optimizer, None) to GRPOTrainer")
    weight_decay: float = copied(0.0, "optimizer.weight_decay")
    adam_beta1: float = copied(0.9, "optimizer.adam_beta1")
    adam_beta2: float = copied(0.999, "optimizer.adam_beta2")
    adam_epsilon: float = copied(1e-8, "optimizer.adam_epsilon")
    optim_target_modules: None | str | list[str] = refused(None, "GaLore and its like are not supported: use LoRA")
    gradient_accumulation_steps: int = mapped(1, "prompts_per_step, objective.mini_batches")
    average_tokens_across_devices: bool = no_effect(True, "losses are divided by counts over all processes")
    max_grad_norm: float = copied(1.0, "optimizer.max_grad_norm")
    label_smoothing_factor: float = refused(0.0, "it belongs to supervised training: leave it out")
    bf16: bool | None = mapped(None, "accelerate's mixed_precision: bf16, unless fp16 or bf16=False")
    fp16: bool = mapped(False, "accelerate's mixed_precision: fp16")
    bf16_full_eval: bool = no_effect(False, "evaluation has the precision of training")
    fp16_full_eval: bool = no_effect(False, "evaluation has the precision of training")
    tf32: bool | None = refused(None, "call torch.set_float32_matmul_precision in the script", False)
    activation_checkpointing: bool | None = mapped(None, "model.gradient_checkpointing")
    activation_checkpointing_kwargs: dict | str | None = no_effect(None, "each layer is recomputed as a whole")
    gradient_checkpointing: bool | None = mapped(True, "model.gradient_checkpointing")
    gradient_checkpointing_kwargs: dict | str | None = no_effect(None, "each layer is recomputed as a whole")
    torch_compile: bool = no_effect(False, "packed batches have kernels of their own, which are not compiled")
    torch_compile_backend: str | None = no_effect(None, "as torch_compile")
    torch_compile_mode: str | None = no_effect(None, "as torch_compile")
    use_liger_kernel: bool = no_effect(False, "logits are never whole in memory, with or without it")
    liger_kernel_config: dict | None = no_effect(None, "as use_liger_kernel")
    use_cache: bool = no_effect(False, "keys and values are cached while sampling, never in training")
    neftune_noise_alpha: float | None = refused(None, "sampling and training would see two policies: leave it out")
    torch_empty_cache_steps: int | None = no_effect(None, "freed memory is returned after each phase")
    auto_find_batch_size: bool = no_effect(False, "tokens_per_batch is halved when memory runs out, same gradient")
    logging_strategy: str = mapped("steps", "state.log_history and on_log (files and trackers get every step)")
    logging_steps: float = mapped(10, "state.log_history and on_log (files and trackers get every step)")
    logging_first_step: bool = mapped(False, "state.log_history and on_log")
    log_on_each_node: bool = no_effect(True, "the main process logs")
    logging_nan_inf_filter: bool = no_effect(True, "a step whose loss is not finite is skipped, and logged as such")
    include_num_input_tokens_seen: str | bool = no_effect("no", NOT_LOGGED, False)
    log_level: str = no_effect("passive", "set the level of the logger grpo")
    log_level_replica: str = no_effect("warning", "the main process logs")
    disable_tqdm: bool | None = no_effect(None, "the progress bar appears in a terminal only")
    report_to: None | str | list[str] = mapped("none", "tracking.report_to")
    run_name: str | None = copied(None, "tracking.run_name")
    project: str = copied("huggingface", "tracking.project")
    trackio_space_id: str | None = refused(None, "trackio logs on this machine: leave it out")
    trackio_bucket_id: str | None = refused(None, "trackio logs on this machine: leave it out")
    trackio_static_space_id: str | None = refused(None, "trackio logs on this machine: leave it out", False)
    eval_strategy: str = mapped("no", "eval_every")
    eval_steps: float | None = mapped(None, "eval_every")
    eval_delay: float = refused(0, "evaluation begins at step 0: leave it out")
    per_device_eval_batch_size: int = no_effect(8, "rollout.slots bounds what is sampled at once")
    prediction_loss_only: bool = no_effect(False, EVALUATION)
    eval_on_start: bool = no_effect(False, "with an evaluation at all, one is made at step 0 and one at the end")
    eval_do_concat_batches: bool = no_effect(True, EVALUATION)
    eval_use_gather_object: bool = no_effect(False, EVALUATION)
    eval_accumulation_steps: int | None = no_effect(None, EVALUATION)
    include_for_metrics: list[str] = no_effect([], EVALUATION)
    batch_eval_metrics: bool = no_effect(False, EVALUATION)
    save_only_model: bool = no_effect(False, "a checkpoint holds everything that an exact resume needs")
    save_strategy: str = mapped("steps", "save_every")
    save_steps: float = mapped(500, "save_every")
    save_on_each_node: bool = no_effect(False, "the main process saves")
    save_total_limit: int | None = mapped(None, "save_total_limit")
    enable_jit_checkpoint: bool = no_effect(False, "a signal always saves a checkpoint first")
    push_to_hub: bool = mapped(False, "push_to_hub() at the end of train()")
    hub_token: str | None = mapped(None, "push_to_hub()")
    hub_private_repo: bool | None = mapped(None, "push_to_hub()")
    hub_model_id: str | None = mapped(None, "push_to_hub()")
    hub_strategy: str = no_effect("every_save", "the model is pushed once, at the end")
    hub_always_push: bool = no_effect(False, "the model is pushed once, at the end")
    hub_revision: str | None = mapped(None, "push_to_hub()")
    load_best_model_at_end: bool = copied(False, "load_best_model_at_end")
    metric_for_best_model: str | None = mapped(None, "metric_for_best_model: eval_rewards/<name>/mean, eval_reward")
    greater_is_better: bool | None = copied(None, "greater_is_better")
    ignore_data_skip: bool = refused(False, "a resumed run goes on at the next prompt, without reading the others")
    restore_callback_states_from_checkpoint: bool = mapped(False, "callbacks with a state() go on with it on resume")
    full_determinism: bool = refused(False, "call torch.use_deterministic_algorithms(True) in the script")
    seed: int = copied(42, "seed")
    data_seed: int | None = refused(None, "the order of the data follows seed")
    use_cpu: bool = mapped(False, "accelerate's use_cpu")
    accelerator_config: dict | str | None = no_effect(None, LOADER)
    parallelism_config: Any = refused(None, LAUNCH)
    dataloader_drop_last: bool = no_effect(False, LOADER)
    dataloader_num_workers: int = no_effect(0, LOADER)
    dataloader_pin_memory: bool = no_effect(True, LOADER)
    dataloader_persistent_workers: bool = no_effect(False, LOADER)
    dataloader_prefetch_factor: int | None = no_effect(None, LOADER)
    dataloader_multiprocessing_context: str | None = no_effect(None, LOADER)
    dataloader_in_order: bool = no_effect(True, LOADER)
    remove_unused_columns: bool | None = no_effect(False, "all columns go to the rewards that name them")
    label_names: list[str] | None = no_effect(None, EVALUATION)
    train_sampling_strategy: str = refused("random", "shuffle_dataset=False keeps the order of the rows")
    length_column_name: str = no_effect("length", "as train_sampling_strategy")
    ddp_find_unused_parameters: bool | None = no_effect(None, LAUNCH)
    ddp_bucket_cap_mb: int | None = no_effect(None, LAUNCH)
    ddp_broadcast_buffers: bool | None = no_effect(None, LAUNCH)
    ddp_static_graph: bool | None = no_effect(None, LAUNCH)
    ddp_backend: str | None = refused(None, LAUNCH, "nccl", "gloo")
    ddp_timeout: int = copied(1800, "rank_timeout")
    fsdp: str | None = refused(None, FSDP, "", False)
    fsdp_config: dict | str | None = refused(None, FSDP, {})
    deepspeed: dict | str | None = refused(None, LAUNCH.replace("X.yaml", "accelerate_configs/deepspeed_zero3.yaml"))
    debug: str | list[str] = no_effect("", "diagnostics are always on", [])
    skip_memory_metrics: bool = no_effect(True, "memory/peak_gib is in every step")
    do_train: bool = no_effect(False, "call train()")
    do_eval: bool = no_effect(False, "eval_strategy decides")
    do_predict: bool = no_effect(False, "call evaluate()")
    resume_from_checkpoint: str | None = no_effect(None, "as in TRL, pass it to train(resume_from_checkpoint=...)")
    local_rank: int = no_effect(-1, LAUNCH)
    model_init_kwargs: dict | str | None = mapped(None, "model.torch_dtype, model.attn_implementation, ...")
    trust_remote_code: bool = refused(False, "code from a model's repository is never run")
    router_aux_loss_coef: float | None = copied(None, "objective.router_aux_loss_coef")
    disable_dropout: bool = no_effect(False, "every dropout is 0, so that sampling and training see one policy")
    cast_lm_head_to_fp32: bool = no_effect(False, "the output head is always in float32")
    num_generations: int | None = copied(8, "sampling.num_generations")
    num_generations_eval: int | None = mapped(None, "evaluation.num_generations (null: num_generations)")
    max_completion_length: int | None = copied(512, "sampling.max_completion_length")
    ds3_gather_for_generation: bool = no_effect(True, "engines sample from a whole copy of the weights")
    shuffle_dataset: bool | None = copied(True, "data.shuffle_dataset")
    pad_to_multiple_of: int | str | None = no_effect("auto", "batches are packed, not padded")
    generation_batch_size: int | None = mapped(None, "prompts_per_step, objective.mini_batches")
    steps_per_generation: int | None = mapped(None, "prompts_per_step, objective.mini_batches")
    temperature: float = copied(1.0, "sampling.temperature")
    top_p: float = refused(1.0, TRUNCATED)
    top_k: int = refused(0, TRUNCATED)
    min_p: float | None = refused(None, TRUNCATED, 0.0)
    generation_kwargs: dict | str | None = refused(None, "sampling has temperature and max_completion_length only", {})
    chat_template_kwargs: dict | str | None = copied(None, "data.chat_template_kwargs")
    repetition_penalty: float = refused(1.0, TRUNCATED)
    cache_implementation: str | None = no_effect(None, "the engine has a cache of its own")
    use_vllm: bool = mapped(False, "rollout.engine: vllm")
    vllm_mode: str = copied("colocate", "rollout.vllm_mode")
    vllm_model_impl: str = refused("vllm", "vLLM chooses its own implementation", "auto")
    vllm_enable_sleep_mode: bool = copied(False, "rollout.vllm_enable_sleep_mode")
    vllm_structured_outputs_regex: str | None = refused(None, TRUNCATED)
    vllm_server_base_url: str | None = copied(None, "rollout.vllm_server_base_url")
    vllm_server_host: str = copied("0.0.0.0", "rollout.vllm_server_host")
    vllm_server_port: int = copied(8000, "rollout.vllm_server_port")
    vllm_server_timeout: float = copied(240.0, "rollout.vllm_server_timeout")
    vllm_group_port: int = copied(51216, "rollout.vllm_group_port")
    vllm_gpu_memory_utilization: float = copied(0.3, "rollout.vllm_gpu_memory_utilization")
    vllm_max_model_length: int | None = copied(None, "rollout.vllm_max_model_length")
    vllm_tensor_parallel_size: int = copied(1, "rollout.vllm_tensor_parallel_size")
    beta: float = copied(0.0, "objective.beta")
    num_iterations: int = copied(1, "objective.num_iterations")
    epsilon: float = copied(0.2, "objective.epsilon")
    delta: float | None = copied(None, "objective.delta")
    epsilon_high: float | None = copied(None, "objective.epsilon_high")
    sapo_temperature_neg: float = copied(1.05, "objective.sapo_temperature_neg")
    sapo_temperature_pos: float = copied(1.0, "objective.sapo_temperature_pos")
    vespo_k_pos: float = copied(2.0, "objective.vespo_k_pos")
    vespo_lambda_pos: float = copied(3.0, "objective.vespo_lambda_pos")
    vespo_k_neg: float = copied(3.0, "objective.vespo_k_neg")
    vespo_lambda_neg: float = copied(2.0, "objective.vespo_lambda_neg")
    importance_sampling_level: str = copied("token", "objective.importance_sampling_level")
    reward_weights: list[float] | None = mapped(None, "rewards")
    multi_objective_aggregation: str = copied("sum_then_normalize", "objective.multi_objective_aggregation")
    scale_rewards: str = copied("group", "objective.scale_rewards")
    loss_type: str = copied("dapo", "objective.loss_type")
    mask_truncated_completions: bool = copied(False, "objective.mask_truncated_completions")
    sync_ref_model: bool = copied(False, "model.sync_ref_model")
    ref_model_mixup_alpha: float = copied(0.6, "model.ref_model_mixup_alpha")
    ref_model_sync_steps: int = mapped(512, "model.ref_model_sync_steps")
    top_entropy_quantile: float = copied(1.0, "objective.top_entropy_quantile")
    entropy_coef: float = copied(0.0, "objective.entropy_coef")
    use_adaptive_entropy: bool = copied(False, "objective.use_adaptive_entropy")
    entropy_coef_min: float = copied(0.0, "objective.entropy_coef_min")
    entropy_coef_max: float = copied(1.0, "objective.entropy_coef_max")
    entropy_coef_delta: float = copied(0.005, "objective.entropy_coef_delta")
    entropy_target: float = copied(0.2, "objective.entropy_target")
    max_tool_calling_iterations: int | None = copied(None, "turns.max_tool_calling_iterations")
    vllm_importance_sampling_correction: bool = mapped(True, "rollout.correction, with use_vllm")
    vllm_importance_sampling_mode: str = mapped("sequence_mask", "rollout.correction, with use_vllm")
    vllm_importance_sampling_clip_max: float | None = mapped(3.0, "rollout.correction_cap, with use_vllm")
    vllm_importance_sampling_clip_min: float | None = mapped(None, "rollout.correction_floor, with use_vllm")
    off_policy_mask_threshold: float | None = copied(None, "objective.off_policy_mask_threshold")
    use_bias_correction_kl: bool = copied(True, "objective.use_bias_correction_kl")
    log_completions: bool = copied(False, "tracking.log_completions")
    log_multimodal: bool = no_effect(True, "prompts are text")
    num_completions_to_print: int | None = no_effect(None, NOT_LOGGED)
    log_unique_prompts: bool = no_effect(False, NOT_LOGGED)
    log_completions_hub_repo: str | None = refused(None, "rollouts.jsonl holds all completions: upload it")
    use_transformers_continuous_batching: bool = no_effect(False, "the native engine batches continuously")
    transformers_continuous_batching_config: dict | str | None = no_effect(None, "rollout.slots, rollout.cache_gib")
    use_transformers_paged: bool = no_effect(False, "the native engine batches continuously")
    vllm_importance_sampling_cap: float | None = mapped(None, "rollout.correction_cap, with use_vllm")

    def __post_init__(self) -> None:
        """Read dicts that came as JSON from a command line, and fill in what TRL derives."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and value.startswith("{"):
                setattr(self, field.name, json.loads(value))
        self.scale_rewards = {True: "group", False: "none"}.get(self.scale_rewards, self.scale_rewards)  # type: ignore[call-overload]
        for name in (
            "lr_scheduler_type",
            "optim",
            "logging_strategy",
            "eval_strategy",
            "save_strategy",
            "hub_strategy",
        ):
            setattr(self, name, getattr(getattr(self, name), "value", getattr(self, name)))  # an Enum of transformers
        if self.bf16 is None:
            self.bf16 = not self.fp16
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")
        self.generation_batch_size, self.steps_per_generation = generation_batch(
            self.per_device_train_batch_size,
            self.world_size,
            self.gradient_accumulation_steps,
            self.num_generations or 0,
            self.generation_batch_size,
            self.steps_per_generation,
        )

    # What scripts and callbacks read of transformers' TrainingArguments

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return env_count("WORLD_SIZE", 1)

    @property
    def process_index(self) -> int:
        """The number of this process."""
        return int(os.environ.get("RANK") or 0)

    @property
    def local_process_index(self) -> int:
        """The number of this process on its machine."""
        return int(os.environ.get("LOCAL_RANK") or 0)

    @property
    def should_log(self) -> bool:
        """This is the main process."""
        return self.process_index == 0

    @property
    def should_save(self) -> bool:
        """This is the main process."""
        return self.process_index == 0

    @property
    def train_batch_size(self) -> int:
        """per_device_train_batch_size."""
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        """per_device_eval_batch_size."""
        return self.per_device_eval_batch_size

    @property
    def device(self) -> Any:
        """The device of this process."""
        from accelerate import PartialState

        return PartialState(cpu=self.use_cpu).device

    def to_dict(self) -> dict[str, Any]:
        """Return every field by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def to_json_string(self) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, default=str)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """Return `to_dict` with values that are no number, text or truth value as text, without tokens."""
        plain = (bool, int, float, str)
        hidden = {"hub_token": "<HUB_TOKEN>" if self.hub_token else None}
        return {
            key: value if isinstance(value, plain) else str(value) for key, value in (self.to_dict() | hidden).items()
        }
