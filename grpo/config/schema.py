"""Config schema: every key with its default, its text, its range and its rules.

    defaults  <-  presets/starter.yaml when model.name is "starter"  <-  --config files, left to right  <-  flags

Keys have TRL's name wherever TRL has one for the same thing, and TRL's default unless the text gives the reason.
A new key is one field here. Losses, estimators, engines and trackers are registered where they are defined, not here.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from grpo.config.setting import keys_of, setting

free = partial(setting, resume="free")
"""A key that may change on resume: it does not affect the result, or it takes effect from the next step on."""
fixed = partial(setting, resume="forbidden")
"""A key that must not change on resume: the checkpoint would not fit."""


@dataclass
class ModelConfig:
    name: str = setting("starter", common=True, trl="model_name_or_path", path=True)
    """Hub id, local folder, GGUF file, or "starter": a small model that is made here, without a download."""
    reference: str | None = setting(None, path=True)
    """Reference policy: null = a frozen copy of the starting model; or another hub id or folder."""
    sync_ref_model: bool = fixed(False, trl="sync_ref_model")
    """Move the reference towards the policy every ref_model_sync_steps steps (TR-DPO, arXiv 2404.09656)."""
    ref_model_mixup_alpha: float = setting(0.6, "(0, 1]", trl="ref_model_mixup_alpha")
    """Share of the policy: reference <- alpha * policy + (1 - alpha) * reference. 1 = a fresh copy of the policy."""
    ref_model_sync_steps: int = setting(512, "[1, inf)", trl="ref_model_sync_steps")
    """Steps between two updates of the reference, with sync_ref_model."""
    reference_offload: bool = free(False)
    """Keep the reference in CPU memory, and on the GPU only while it is used."""
    torch_dtype: Literal["float32", "bfloat16"] = fixed("float32", trl="dtype")
    """Data type of the weights. Trained weights need float32: at learning rate 1e-6 AdamW changes almost no bfloat16
    weight. bfloat16 only with lora.r, whose base is frozen. Compute precision is accelerate's mixed_precision."""
    attn_implementation: str = free("grpo", trl="attn_implementation")
    """grpo = packed attention, which computes a group's shared prompt once (sdpa where a test at start-up finds that
    it is not exact for this model); or one of transformers': sdpa, eager, flash_attention_2, ..."""
    gguf_file: str | None = fixed(None, path=True)
    """The GGUF file (Ollama, llama.cpp) to load from the folder or hub id in model.name, where it holds several.
    docs/gguf.md"""
    load_in_4bit: bool = fixed(False, trl="load_in_4bit")
    """QLoRA: base weights in 4 bits (nf4). Needs lora.r and bitsandbytes."""
    gradient_checkpointing: bool = free(False, common=True, trl="gradient_checkpointing")
    """Recompute activations in the backward pass: less memory, about a third more compute. TRL's default is true."""


@dataclass
class LoraConfig:
    r: int | None = fixed(None, "[1, inf)", common=True, trl="lora_r")
    """Rank of the adapter; null = full fine-tuning."""
    lora_alpha: int = setting(32, "[1, inf)", common=True, trl="lora_alpha")
    """The adapter is scaled by lora_alpha / r."""
    target_modules: list[str] = fixed(["all-linear"], trl="lora_target_modules")
    """Ends of layer names (q_proj, v_proj, lm_head, embed_tokens, ...), or all-linear = every linear layer but the
    head. TRL's default is peft's: query and value projections only."""
    use_rslora: bool = setting(False, trl="use_rslora")
    """Scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732)."""


@dataclass
class DataConfig:
    name: str = setting("gsm8k", common=True, trl="dataset_name")
    """A registered dataset (gsm8k, question_answer, arithmetic, word_problems, invented_language, reasoning_gym,
    verifiers), or your own: package.module:function, file.py:function."""
    dataset_kwargs: dict[str, Any] = setting({})
    """Arguments of the dataset by name: {task: chain_sum} for reasoning_gym."""
    path: str | None = setting(None, common=True, path=True)
    """Training rows: a local JSONL, JSON, CSV or Parquet file, a dataset on the hub (owner/name), or a folder that
    `datasets` can load. Null = the dataset's own source (gsm8k: openai/gsm8k)."""
    subset: str | None = setting(None, trl="dataset_config")
    """Configuration of a hub dataset, where it has several."""
    split: str = setting("train", trl="dataset_train_split")
    """Split of a hub dataset to train on."""
    eval_path: str | None = free(None, common=True, path=True)
    """Held-out rows. Null = the dataset's own held-out part, where it has one."""
    eval_split: str | None = free(None, trl="dataset_test_split")
    """Split of the hub dataset in data.path that is held out; null = none. eval_path takes precedence."""
    eval_size: int | None = free(500, "[1, inf)")
    """Largest number of held-out rows to evaluate (the first ones, always the same); null = all."""
    question: str = setting("question", common=True)
    """Column with the question."""
    answer: str = setting("answer", common=True)
    """Column with the answer."""
    pair_id: str = setting("pair_id")
    """Column with a permanent name of the row. Rewards, rollouts, evaluation and feedback carry it as pair_id."""
    generated_at: str = setting("generated_at")
    """Column with the time at which the row was made; carried as generated_at."""
    extractor: str = setting("hash", common=True)
    """Reads the gold answer from the answer column: hash (#### N), xml, boxed, number, quoted_terms, plain."""
    system_prompt: str | None = setting("xml", common=True)
    """System message: "xml" = the reasoning/answer format that the format rewards look for, null = none, or your
    own."""
    one_shot: bool = setting(False)
    """Show a built-in worked example, as an earlier turn, before the question."""
    examples: list[dict[str, Any]] | str | None = setting(None, common=True, path=True)
    """Worked examples of your own, shown as earlier turns before every question: rows of the data (a list in YAML, or
    a JSONL, CSV or Parquet file), with a column reasoning or completion where the answer column does not show how."""
    chat_template_kwargs: dict[str, Any] = setting({})
    """Settings of the model's chat template: {enable_thinking: false} for Qwen3 and SmolLM3, {date_string: 1 May 2026}.
    Training, evaluation and chat use the same."""
    card: str | None = free(None, path=True)
    """YAML file with source, licence and permission. Null = FILE.card.yaml or data_card.yaml beside data.path, if
    any."""
    i_have_permission: bool = free(False)
    """You state that the data's stewards permit this use, whatever the card says. The model card shows it."""
    bad_rows: Literal["error", "skip"] = setting("error")
    """Handling of a row that cannot be used: stop and name it, or skip it and write it to rejected.jsonl in the run
    directory."""
    cache: Literal["auto", "always", "never"] = free("auto")
    """Keep the tokenised prompts of data.path in an Arrow file that the next start maps into memory; auto = files of
    8 MB and more."""
    streaming: bool = fixed(False, trl="dataset_streaming")
    """Read and tokenise rows when they are drawn, instead of before training."""
    shuffle_dataset: bool = setting(True, trl="shuffle_dataset")
    """Draw the rows in a new order in every epoch. false = in their own order."""
    shuffle_buffer: int = setting(10_000, "[1, inf)")
    """Number of rows that streaming shuffles among each other."""
    max_prompt_length: int | None = setting(512, "[1, inf)", common=True)
    """Longest prompt in tokens, chat template applied; longer rows are left out and counted. Null = no limit."""


@dataclass
class CurriculumConfig:
    reward: str | None = fixed(None, common=True)
    """One of `rewards`: its mean over a prompt's completions measures the difficulty. Null = no curriculum."""
    solved: float = setting(1.0, "(-inf, inf)")
    """A prompt with a mean of at least this is solved."""
    hopeless: float = setting(0.0, "(-inf, inf)")
    """A prompt with a mean of at most this is hopeless."""
    patience: int = setting(1, "[1, inf)")
    """Set a prompt aside after it was solved, or hopeless, this many times in a row."""
    return_after: int = setting(3, "[1, inf)")
    """Epochs until it is drawn and measured again."""


@dataclass
class SamplingConfig:
    num_generations: int = setting(
        8,
        "[2, inf)",
        why="a lone completion has no siblings to be compared with, so its advantage is always 0",
        common=True,
        trl="num_generations",
    )
    """G: completions per prompt."""
    max_completion_length: int = setting(512, "[1, inf)", common=True, trl="max_completion_length")
    """Longest completion in tokens."""
    temperature: float = setting(
        1.0,
        "(0, inf)",
        why="greedy completions of one prompt are all the same, so nothing could be learned from comparing them",
        common=True,
        trl="temperature",
    )
    """Sampling temperature. Training uses the same."""
    top_p: float = setting(1.0, "(0, 1]", trl="top_p")
    """1 = off. Other values are refused in training: they would bias the importance ratios."""
    top_k: int = setting(0, "[0, inf)", trl="top_k")
    """0 = off. Other values are refused in training: they would bias the importance ratios."""
    dynamic_sampling: bool = setting(False)
    """Leave out groups whose rewards are all equal, and sample other prompts until there are prompts_per_step
    (DAPO)."""
    max_sampling_rounds: int = setting(4, "[1, inf)")
    """With dynamic_sampling: rounds of sampling in a step; after the last one it learns from the groups it has."""
    oversample: float = setting(1.0, "[1, inf)")
    """With dynamic_sampling: each round samples this many times the number of missing prompts."""


@dataclass
class EvaluationConfig:
    num_generations: int = free(1, "[1, inf)", trl="num_generations_eval")
    """Completions per held-out prompt in the evaluations of training. Above 1, eval/pass@k is measured, too."""
    temperature: float = free(0.0, "[0, inf)")
    """Temperature of these completions. 0 = greedy."""
    top_p: float = free(1.0, "(0, 1]")
    """Draw from the most likely tokens whose probabilities add up to this. 1 = off."""
    top_k: int = free(0, "[0, inf)")
    """Draw from so many most likely tokens. 0 = off."""
    min_p: float = free(0.0, "[0, 1]")
    """Draw from tokens of at least this times the largest probability. 0 = off."""
    repetition_penalty: float = free(1.0, "(0, inf)")
    """Divide positive logits of tokens in the prompt and the completion so far by this, multiply negative ones. 1 =
    off."""


@dataclass
class ObjectiveConfig:
    loss_type: str = setting("dapo", common=True, trl="loss_type")
    """A registered loss (docs/theory.md), or your own: package.module:name, path/file.py:name."""
    loss_kwargs: dict[str, Any] = setting({})
    """Settings of a loss of your own, by name: {tau: 0.7}."""
    importance_sampling_level: Literal["token", "sequence"] | None = setting(None, trl="importance_sampling_level")
    """Ratio of each token, or of the whole completion (its geometric mean). Null = as in the paper of loss_type."""
    advantage_estimator: str | None = setting(None)
    """A registered advantage estimator (docs/theory.md), or your own. Null = that of loss_type, mostly group."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = setting(
        "sum_then_normalize", trl="multi_objective_aggregation"
    )
    """normalize_then_sum: normalize each reward by itself before they are summed."""
    beta: float = setting(0.04, "[0, inf)", common=True, trl="beta")
    """Weight of the KL to the reference policy. 0.04 as in DeepSeekMath (TRL: 0.0), because a reference KL is what this
    trainer is for. 0 = off, and no reference is loaded."""
    kl_estimator: str = setting("k3")
    """A registered KL estimator (k1, k2, k3), or your own."""
    use_bias_correction_kl: bool = setting(True, trl="use_bias_correction_kl")
    """Multiply the KL estimate by the ratio, so that its gradient is that of the KL to the reference (grpo/kl.py)."""
    kl_in_reward: bool = setting(False)
    """Subtract beta * KL of the whole completion from its reward, instead of adding it to the loss."""
    kl_target: float | None = setting(None, "(0, inf)")
    """Adapt beta so that policy/kl (per token) stays near this value. Null = beta is constant."""
    kl_horizon: int = setting(10000, "[1, inf)")
    """Completions over which beta adapts, where kl_target is set."""
    entropy_coef: float = setting(0.0, "(-inf, inf)", trl="entropy_coef")
    """Bonus for the mean entropy per token. With use_adaptive_entropy: its first value."""
    use_adaptive_entropy: bool = setting(False, trl="use_adaptive_entropy")
    """Raise entropy_coef by entropy_coef_delta after each optimizer step whose mean entropy per token was at most
    entropy_target, lower it otherwise; apply it only after such steps (Skywork-OR1)."""
    entropy_coef_min: float = setting(0.0, "(-inf, inf)", trl="entropy_coef_min")
    """Lowest value of the adapted entropy_coef."""
    entropy_coef_max: float = setting(1.0, "(-inf, inf)", trl="entropy_coef_max")
    """Highest value of the adapted entropy_coef."""
    entropy_coef_delta: float = setting(0.005, "[0, inf)", trl="entropy_coef_delta")
    """Change of the adapted entropy_coef in one optimizer step."""
    entropy_target: float = setting(0.2, "[0, inf)", trl="entropy_target")
    """Entropy in nats per token below which the bonus is applied, with use_adaptive_entropy: a value near the entropy
    at the start (policy/entropy)."""
    router_aux_loss_coef: float | None = setting(None, "[0, inf)", trl="router_aux_loss_coef")
    """Weight of the load-balancing loss of a mixture of experts (docs/models.md). Null = that of the model's config.
    0 = off."""
    epsilon: float = setting(0.2, "[0, inf)", common=True, trl="epsilon")
    """Clip of the ratio: 1 - epsilon below, 1 + epsilon_high above."""
    epsilon_high: float | None = setting(None, "[0, inf]", common=True, trl="epsilon_high")
    """Upper clip; null = epsilon. DAPO: 0.28. Some losses define it otherwise (docs/theory.md)."""
    delta: float | None = setting(None, "(0, inf]", trl="delta")
    """Cap of the ratio where the advantage is negative (dual clip); above 1 + epsilon_high, for example 4. Null =
    none."""
    sapo_temperature_pos: float = setting(1.0, "(0, inf)", trl="sapo_temperature_pos")
    """Steepness of the soft clip where the advantage is positive."""
    sapo_temperature_neg: float = setting(1.05, "(0, inf)", trl="sapo_temperature_neg")
    """Steepness of the soft clip where the advantage is negative."""
    vespo_k_pos: float = setting(2.0, "[0, inf)", trl="vespo_k_pos")
    """Exponent k of the sequence weight where the advantage is positive."""
    vespo_lambda_pos: float = setting(3.0, "[0, inf)", trl="vespo_lambda_pos")
    """Decay lambda of the sequence weight where the advantage is positive."""
    vespo_k_neg: float = setting(3.0, "[0, inf)", trl="vespo_k_neg")
    """Exponent k of the sequence weight where the advantage is negative."""
    vespo_lambda_neg: float = setting(2.0, "[0, inf)", trl="vespo_lambda_neg")
    """Decay lambda of the sequence weight where the advantage is negative."""
    off_policy_mask_threshold: float | None = setting(None, "(0, inf)", trl="off_policy_mask_threshold")
    """Leave completions with a negative advantage out of the policy term if the mean of log p(sampling) - log
    p(training) over their tokens is above this value (DeepSeek-V3.2). Null = none."""
    top_entropy_quantile: float = setting(1.0, "(0, 1]", trl="top_entropy_quantile")
    """Share of tokens, those with the highest entropies of the mini-batch, that have a policy gradient (0.2 in arXiv
    2506.01939). Below 1, one more forward pass for each optimizer step. 1 = all."""
    num_iterations: int = setting(1, "[1, inf)", common=True, trl="num_iterations")
    """Passes over the completions of a step (mu); each takes mini_batches optimizer steps."""
    mini_batches: int = setting(1, "[1, inf)", common=True)
    """Equal parts of a step's completions, in the order of the prompts, with an optimizer step on each (verl:
    data.train_batch_size / ppo_mini_batch_size; TRL: steps_per_generation / gradient_accumulation_steps)."""
    scale_rewards: Literal["group", "batch", "none"] = setting("group", common=True, trl="scale_rewards")
    """Divide advantages by the standard deviation of the group, of the whole batch, or not at all (Dr. GRPO)."""
    mask_truncated_completions: bool = setting(False, trl="mask_truncated_completions")
    """Leave truncated completions out of the loss (DAPO's overlong filter)."""
    soft_overlong_cache: int = setting(0, "[0, inf)")
    """The last so many tokens before max_completion_length cost reward, up to -1 at the limit (DAPO's soft overlong
    punishment). 0 = off."""
    subset: str | None = setting(None)
    """Learn from subset_size completions of each group only: max_variance (PODS), shortest, token_efficiency, or your
    own. Null = that of loss_type, mostly all."""
    subset_size: int | None = setting(None, "[2, inf)")
    """Null = half of sampling.num_generations, where there is a subset."""


@dataclass
class OptimizerConfig:
    optim: str = fixed("adamw_torch", trl="optim")
    """A registered optimizer: adamw_torch (also adamw_torch_fused), adafactor, sgd, and of bitsandbytes adamw_8bit
    (also adamw_bnb_8bit), paged_adamw_8bit and paged_adamw_32bit; or your own: package.module:function,
    file.py:function. DeepSpeed takes adamw_torch only. Those of bitsandbytes were tried on a CPU, not on a GPU or with
    FSDP."""
    learning_rate: float = free(1e-6, "[0, inf)", common=True, trl="learning_rate")
    """Peak learning rate."""
    adam_beta1: float = free(0.9, "[0, 1)", trl="adam_beta1")
    """Decay of AdamW's first moment."""
    adam_beta2: float = free(0.999, "[0, 1)", trl="adam_beta2")
    """Decay of AdamW's second moment."""
    adam_epsilon: float = free(1e-8, "(0, inf)", trl="adam_epsilon")
    """Added to the root of AdamW's second moment."""
    weight_decay: float = free(0.0, "[0, inf)", trl="weight_decay")
    """AdamW's. A step whose groups are all flat is skipped where beta is 0, with its decay and momentum; with a beta it
    is taken."""
    warmup_ratio: float = free(0.0, "[0, 1]", common=True, trl="warmup_steps")
    """Share of the steps in which the learning rate rises to its peak."""
    lr_scheduler_type: str = free("linear", common=True, trl="lr_scheduler_type")
    """Schedule after the warm-up, one of transformers': linear, cosine, cosine_with_restarts, polynomial, constant
    (without warm-up), constant_with_warmup, inverse_sqrt, cosine_with_min_lr, cosine_warmup_with_min_lr,
    warmup_stable_decay."""
    lr_scheduler_kwargs: dict[str, Any] = free({}, trl="lr_scheduler_kwargs")
    """Settings of the schedule, by name: {min_lr_rate: 0.1} for cosine_with_min_lr, {num_decay_steps: 100} for
    warmup_stable_decay (in optimizer steps)."""
    max_grad_norm: float = free(
        1.0,
        "[0, inf]",
        why="the gradient is scaled down to this norm. 0 or .inf = no clipping",
        common=True,
        trl="max_grad_norm",
    )
    """Clip the norm of the gradient to this value. 0, as in TRL, or .inf (YAML's infinity) = no clipping."""


@dataclass
class RolloutConfig:
    engine: str = free("native", common=True)
    """native (own decode loop), transformers (model.generate: slower, the reference), vllm (see vllm_mode), or your
    own: package.module:Class, path/file.py:Class."""
    engine_kwargs: dict[str, Any] = free({})
    """Settings of an engine of your own, by name."""
    slots: int = free(256, "[1, inf)", common=True)
    """Largest number of completions that each process decodes at the same time; more wait in a queue."""
    cache_gib: float | None = free(None, "[0, inf)")
    """Memory for keys and values while sampling, per process, in GiB: as many slots as fit are used. Null = half of the
    free memory when sampling starts."""
    max_staleness: int = setting(0, "[0, inf)")
    """Sample the completions of so many later steps while the policy learns from this one's: each step then learns from
    completions of an older policy. 0 = never, and exact. Keeps a copy of the weights to sample from."""
    correction: Literal["none", "truncate", "mask", "sequence_truncate", "sequence_mask", "geometric_mask"] | None = (
        setting(None)
    )
    """Weight tokens by p(training) / p(sampling), where another policy drew them: capped (truncate: TIS), or left out
    outside of the bounds (mask: IcePop). sequence_...: the weight of the whole completion, the product over its tokens;
    geometric_mask: their geometric mean. none is exact where the policy that trains is the one that sampled. Null =
    truncate with max_staleness above 0 and for engines with their own rounding, else none."""
    correction_cap: float = setting(2.0, "[1, inf]")
    """Cap of these weights."""
    correction_floor: float | None = setting(None, "[0, 1]")
    """Lower bound of these weights. Null = 0 for ..._truncate, 1 / correction_cap for ..._mask."""
    max_logprob_difference: float | None = free(None, "[0, inf]")
    """Mean |log p(sampling) - log p(training)| per token that ends the run: at the start, and after each step with
    lora.r or an engine with weights of its own. Null = 1e-3 in float32, 2e-2 in float16, 0.1 in bfloat16."""
    vllm_mode: Literal["server", "colocate"] = free("colocate", trl="vllm_mode")
    """vLLM in this process, or a server that launch/vllm_server.py starts. docs/vllm.md"""
    vllm_server_base_url: str | None = free(None, trl="vllm_server_base_url")
    """For example http://10.0.0.7:8000. Null = from host and port."""
    vllm_server_host: str = free("127.0.0.1", trl="vllm_server_host")
    """Host of the server."""
    vllm_server_port: int = free(8000, "[1, 65535]", trl="vllm_server_port")
    """Port of the server."""
    vllm_server_timeout: float = free(240.0, "[1, inf)", trl="vllm_server_timeout")
    """Seconds to wait for the server at the start, and for a sign of life later."""
    vllm_group_port: int = free(0, "[0, 65535]", trl="vllm_group_port")
    """Port on the main process's machine through which the server's workers meet it. 0 = any (TRL: 51216)."""
    vllm_weight_transfer: Literal["auto", "nccl", "gloo"] = free("auto")
    """Transport of the weights to a server. auto = nccl from a GPU, else gloo. nccl cannot connect two processes on one
    GPU."""
    vllm_gpu_memory_utilization: float = free(0.3, "(0, 1]", trl="vllm_gpu_memory_utilization")
    """colocate: the share of the GPU's memory that vLLM takes."""
    vllm_enable_sleep_mode: bool = free(False, trl="vllm_enable_sleep_mode")
    """colocate: free the memory of vLLM's weights, keys and values during each update. Not on a CPU."""
    vllm_tensor_parallel_size: int = free(1, "[1, inf)", trl="vllm_tensor_parallel_size")
    """colocate: processes that share one copy of vLLM's weights. A server has its own --tensor-parallel-size."""
    vllm_max_model_length: int | None = free(None, "[1, inf)", trl="vllm_max_model_length")
    """colocate: tokens of the longest prompt and completion. Null = data.max_prompt_length + max_completion_length."""


@dataclass
class TurnsConfig:
    max_tool_calling_iterations: int | None = setting(None, "[0, inf)", trl="max_tool_calling_iterations")
    """Largest number of turns with calls in a completion; the calls of a later turn are not run. Null = as many as fit
    into max_completion_length."""
    deadline: float = free(10.0, "[0.1, inf]")
    """Seconds for one call of a tool or one step of an environment, in a process that is killed then. The model reads
    the error as the result."""
    max_result_length: int = setting(2000, "[1, inf)")
    """Characters of the result of a tool; the rest is cut off."""
    workers: int = free(2, "[0, inf)")
    """Processes that run tools and environments. 0 = in the training process, without a deadline: for debugging."""
    show_tools: bool = setting(True)
    """Show the schemas of the tools in the prompt, as the chat template does. false = the prompt describes them."""
    rewritten_history: Literal["refuse", "keep"] = setting("refuse")
    """Chat template that changes earlier turns when a later one follows (it drops their thinking): refuse it, or keep
    in the context what was sampled."""
    trust_model_code: bool = setting(False)
    """Allow tools that run code of the model (python): as this user, in a process with limits (docs/tools.md)."""


@dataclass
class ScoringConfig:
    deadline: float = free(60.0, "[0.1, inf]", common=True)
    """Seconds that one reward function may take for a step's completions, in a process of its own that is killed then;
    finding the completions to blame may take as long again."""
    on_error: Literal["mask", "zero", "raise"] = free("mask", common=True)
    """Handling of a completion that a reward cannot score: mask (left out of its group, and counted), zero, or
    raise."""
    workers: int = free(2, "[0, inf)")
    """Processes for each reward that scores completions one by one. 0 = all rewards in the training process, without a
    deadline, every failure an error: for debugging."""


@dataclass
class TrackingConfig:
    report_to: list[str] = free(["tensorboard"], common=True, trl="report_to")
    """Any of wandb, tensorboard, trackio. metrics.jsonl and rollouts.jsonl are always written."""
    project: str = free("GRPO-Fine-Tuning", trl="project")
    """Project name in the trackers."""
    run_name: str | None = free(None, common=True, trl="run_name")
    """Null = model, data and time."""
    log_completions: bool = free(True, trl="log_completions")
    """Show a few completions in the terminal now and then, and a table of them in the trackers."""
    report: bool = free(True)
    """Write report.md and its curves into run_dir at the end."""
    finish_timeout: float = free(5.0, "[0, inf]")
    """Seconds that the end of a run waits for uploads, after final/ and report.md; longer is an outage."""


@dataclass
class Config:
    seed: int = setting(0, "[0, 9223372036854775807]", common=True, trl="seed")
    """Seed of sampling, data order and initial weights."""
    steps: int = free(500, "[1, inf)", common=True, trl="max_steps")
    """Training steps: each samples prompts_per_step x num_generations completions and learns from them."""
    num_train_epochs: float | None = free(None, "(0, inf)", common=True, trl="num_train_epochs")
    """Passes over the training prompts; when set, it determines `steps`."""
    run_dir: str | None = free(None, common=True, trl="output_dir", path=True)
    """Directory of everything that the run writes. Null = outputs/<run_name>."""
    resume: str | None = free(None, common=True, trl="resume_from_checkpoint", path=True)
    """auto = continue from the newest checkpoint in run_dir, if there is one; or the folder of one checkpoint."""
    allow_changes: list[str] = free([])
    """Keys that may change on resume although that makes it another run, for example [sampling.num_generations]."""
    eval_every: int = free(50, "[0, inf)", common=True, trl="eval_steps")
    """Held-out evaluation at step 0, every so many steps, and at the end. 0 = never."""
    save_every: int = free(100, "[0, inf)", common=True, trl="save_steps")
    """A checkpoint every so many steps, and at the end. 0 = only at the end."""
    save_total_limit: int = free(2, "[1, inf)", trl="save_total_limit")
    """Number of checkpoints to keep."""
    load_best_model_at_end: bool = free(False, trl="load_best_model_at_end")
    """final/ is the model of the best evaluation after step 0, instead of the last one. It is kept in best/ meanwhile;
    checkpoints are not affected."""
    metric_for_best_model: str = free("eval/accuracy", trl="metric_for_best_model")
    """Metric that decides which evaluation is the best (docs/metrics.md)."""
    greater_is_better: bool | None = free(None, trl="greater_is_better")
    """Larger values of that metric are better. Null = yes, unless its name ends with loss."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = free(None)
    """Data type of the weights in final/. Null = that of the model that training started from. Checkpoints hold the
    trained weights in float32."""
    rank_timeout: float = free(600.0, "[1, inf)", trl="ddp_timeout")
    """Seconds that processes wait for one of them before the run ends: longer than the longest step or save."""
    prompts_per_step: int = setting(8, "[1, inf)", common=True)
    """P: prompts per step, over all processes."""
    tokens_per_batch: int = free(8192, "[1, inf)", common=True)
    """Prompt and completion tokens that go through the model at once in training: bounds memory, never changes the
    gradient. Of models without packed attention, padding included."""
    rewards: dict[str, float] = setting({"accuracy": 1.0, "xml_format": 0.2}, common=True, trl="reward_funcs")
    """Reward function -> weight. Registered names, package.module:function, or path/file.py:function."""
    reward_kwargs: dict[str, dict[str, Any]] = setting({})
    """Keyword arguments of reward functions: a name in `rewards` -> {argument: value}."""
    tools: list[str] = setting([], common=True)
    """Functions that the model may call between its turns: calculator, retrieval, python, package.module:function, or
    path/file.py:function. [] = one turn."""
    environment: str | None = setting(None)
    """Class that answers each turn of the model: package.module:Class, path/file.py:Class. Null = none."""
    environment_kwargs: dict[str, Any] = setting({})
    """Arguments of the environment's constructor, by name."""
    callbacks: list[str] = free([])
    """Your own code during training, for example more metrics: layer_gradient_norms, package.module:Class, or
    path/file.py:Class."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    turns: TurnsConfig = field(default_factory=TurnsConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the run: the length of the learning rate schedule."""
        return self.steps * self.objective.num_iterations * self.objective.mini_batches


def to_dict(config: Config) -> dict[str, Any]:
    """Return the config as nested plain values, ready for YAML."""
    return dataclasses.asdict(config)


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}. A key that is a table (rewards, loss_kwargs) stays one value."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and path not in keys_of(Config):
            flat.update(flatten(value, path + "."))
        else:
            flat[path] = value
    return flat
