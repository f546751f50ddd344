"""Config: files and flags -> one checked Config. The only file that knows the parser (jsonargparse); imports no torch.

    defaults  <-  presets/starter.yaml when model.name is "starter"  <-  --config files, left to right  <-  flags

Keys carry TRL's name wherever TRL has one for the same thing, and TRL's default unless the line says why not.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class ModelConfig:
    name: str = "starter"
    """A hub id, a local folder, or "starter": a small model that is made here, without a download."""
    reference: str | None = None
    """Reference policy: null = a frozen copy of the starting model; or another hub id or folder."""
    sync_ref_model: bool = False
    """Move the reference towards the policy every ref_model_sync_steps steps (TR-DPO, arXiv 2404.09656)."""
    ref_model_mixup_alpha: float = 0.6
    """How far: reference <- alpha * policy + (1 - alpha) * reference. 1 = a fresh copy of the policy."""
    ref_model_sync_steps: int = 512
    reference_offload: bool = False
    """Keep the reference in the machine's memory, and on the GPU only while it is used."""
    torch_dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights in memory. float32 where they are trained: at learning rate 1e-6 AdamW changes almost no bfloat16 weight.
    bfloat16 only with lora.r, whose base is frozen. Compute precision is accelerate's mixed_precision."""
    attn_implementation: str = "grpo"
    """grpo = ours, which computes a group's shared prompt once (where a start-up probe finds it exact for this model, else sdpa);
    or one of transformers' own: sdpa, eager, flash_attention_2, ... with rollout.engine transformers."""
    gguf_file: str | None = None
    """Load this GGUF file (of Ollama, llama.cpp) from the folder or hub id in model.name, dequantized."""
    load_in_4bit: bool = False
    """QLoRA: base weights in 4 bits (nf4). Needs lora.r and bitsandbytes."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute. TRL's default is true."""


@dataclass
class LoraConfig:
    r: int | None = None
    """Rank of the adapter; null = full fine-tuning."""
    lora_alpha: int = 32
    """The adapter counts lora_alpha / r times."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Ends of layer names (q_proj, v_proj, lm_head, embed_tokens, ...), or all-linear = every linear layer but the head.
    TRL's default is peft's: query and value projections only."""
    use_rslora: bool = False
    """Divide by sqrt(r) instead of r (arXiv 2312.03732)."""


@dataclass
class DataConfig:
    name: str = "gsm8k"
    """A registered dataset (gsm8k, question_answer, arithmetic, invented_language) or your own: package.module:function, file.py:function."""
    path: str | None = None
    """Training rows: a local JSONL, CSV or Parquet file; for question_answer also a dataset on the hub (owner/name) or a
    folder that `datasets` can load. Null = the dataset's own source (gsm8k: openai/gsm8k)."""
    subset: str | None = None
    """Which configuration of a hub dataset, where it has several."""
    split: str = "train"
    """Which split of a hub dataset to train on."""
    eval_path: str | None = None
    """Held-out rows. Null = the dataset's own held-out part, where it has one."""
    eval_split: str | None = None
    """Which split of the hub dataset in data.path is held out; null = none (eval_path wins)."""
    eval_size: int | None = 500
    """At most this many held-out rows are evaluated (the first ones, always the same); null = all."""
    question: str = "question"
    """Column that holds the question."""
    answer: str = "answer"
    """Column that holds the answer."""
    pair_id: str = "pair_id"
    """Column that names a row for good. Rewards, rollouts, evaluation and feedback carry it as pair_id."""
    generated_at: str = "generated_at"
    """Column that says when a row was made; carried as generated_at."""
    extractor: str = "hash"
    """How the gold answer is read from the answer column: hash (#### N), xml, boxed, number, quoted_terms, plain."""
    system_prompt: str | None = "xml"
    """System message: "xml" = the reasoning/answer format that the format rewards look for, null = none, or your own."""
    one_shot: bool = False
    """Show one worked example, as an earlier turn, before the question."""
    card: str | None = None
    """YAML file with source, licence and permission. Null = FILE.card.yaml or data_card.yaml beside data.path, if there."""
    i_have_permission: bool = False
    """You state that the data's stewards permit this use, whatever the card says. The model card shows it."""
    bad_rows: Literal["error", "skip"] = "error"
    """A row that cannot be used: stop and name it, or leave it out and write it to rejected.jsonl in the run directory."""
    cache: Literal["auto", "always", "never"] = "auto"
    """Keep the tokenised prompts of data.path in an Arrow file that is mapped into memory and found again at the next
    start; auto = files of 8 MB and more."""
    streaming: bool = False
    """Read and tokenise rows when they are drawn, instead of before training."""
    shuffle_buffer: int = 10_000
    """Rows among which streaming shuffles."""
    max_prompt_length: int | None = 512
    """Longest prompt in tokens, chat template applied; longer rows are left out and counted. Null = no limit."""


@dataclass
class CurriculumConfig:
    reward: str | None = None
    """One of `rewards`, whose mean over a prompt's completions measures how hard it is. Null = no curriculum."""
    solved: float = 1.0
    """A prompt with a mean of at least this is solved."""
    hopeless: float = 0.0
    """A prompt with a mean of at most this is hopeless."""
    patience: int = 1
    """Set a prompt aside when it was solved, or hopeless, so many times in a row."""
    return_after: int = 3
    """Epochs until it is drawn, and measured, again."""


@dataclass
class SamplingConfig:
    num_generations: int = 8
    """G: completions per prompt."""
    max_completion_length: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 = off."""
    dynamic_sampling: bool = False
    """Leave out groups whose rewards are all equal, and sample other prompts until prompts_per_step are left (DAPO)."""
    max_sampling_rounds: int = 4
    """With dynamic_sampling: at most so many rounds of sampling in a step; then it learns from the groups it has."""
    oversample: float = 1.0
    """With dynamic_sampling: each round samples this many times the prompts that are missing."""


@dataclass
class ObjectiveConfig:
    loss_type: str = "dapo"
    """A registered objective: grpo, dapo, dr_grpo, bnpo, gspo, luspo, cispo, sapo, vespo, gfpo, rloo, reinforce_plus_plus; or
    your own: package.module:name, path/file.py:name."""
    loss_kwargs: dict[str, Any] = field(default_factory=dict)
    """Settings of a loss of your own, by name: {tau: 0.7}."""
    importance_sampling_level: Literal["token", "sequence"] | None = None
    """Ratio of each token, or of the whole completion (its geometric mean). Null = what loss_type's paper uses (gspo and luspo:
    sequence, else token)."""
    advantage_estimator: str | None = None
    """group, rloo, reinforce_plus_plus, reinforce_plus_plus_baseline, gdpo; or your own. Null = loss_type's own (rloo: rloo,
    reinforce_plus_plus: the same, else group)."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """normalize_then_sum: each reward is normalised by itself (advantage_estimator gdpo)."""
    beta: float = 0.04
    """Weight of the KL to the reference policy. 0.04 as in DeepSeekMath (TRL: 0.0), because a reference KL is what this
    trainer is for. 0 = off, and no reference is loaded."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    use_bias_correction_kl: bool = True
    """Multiply the KL estimate by the ratio, so that its gradient is that of the KL to the reference (grpo/kl.py)."""
    kl_in_reward: bool = False
    """Subtract beta * KL of the whole completion from its reward, instead of adding it to the loss."""
    kl_target: float | None = None
    """Adapt beta so that policy/kl (per token) stays near this value. Null = beta stays as it is."""
    kl_horizon: int = 10000
    """Completions over which beta adapts, where kl_target is set."""
    entropy_coef: float = 0.0
    """Bonus for the mean entropy per token."""
    epsilon: float = 0.2
    epsilon_high: float | None = None
    """Upper clip; null = epsilon. DAPO: 0.28. For cispo the cap of the ratio itself; null = 5."""
    delta: float | None = None
    """Cap of the ratio where the advantage is negative (dual clip); above 1 + epsilon_high, for example 4. Null = none."""
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    num_iterations: int = 1
    """Optimizer steps on the same completions (mu)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group, of the whole batch, or not at all (Dr. GRPO)."""
    mask_truncated_completions: bool = False
    """Leave completions that were cut off out of the loss (DAPO's overlong filter)."""
    soft_overlong_cache: int = 0
    """The last so many tokens before max_completion_length cost reward, up to -1 at the limit (DAPO's soft overlong
    punishment). 0 = off."""
    subset: str | None = None
    """Learn from subset_size completions of each group only: max_variance (PODS), shortest, token_efficiency (GFPO). Null =
    loss_type's own (gfpo: shortest, else all)."""
    subset_size: int | None = None
    """Null = half of sampling.num_generations, where there is a subset."""


@dataclass
class OptimizerConfig:
    optim: str = "adamw_torch"
    """A registered optimizer (adamw_torch) or your own: package.module:function, file.py:function."""
    learning_rate: float = 1e-6
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    weight_decay: float = 0.0
    """AdamW's. A step whose groups are all flat is left out where beta is 0, decay and momentum with it; with a beta it is taken."""
    warmup_ratio: float = 0.0
    lr_scheduler_type: str = "linear"
    max_grad_norm: float = 1.0


@dataclass
class RolloutConfig:
    engine: str = "native"
    """native (own decode loop), transformers (model.generate: slower, the reference) or vllm (see vllm_mode)."""
    slots: int = 256
    """Completions that are decoded at the same time on each process, at most; more wait in a queue."""
    cache_gib: float | None = None
    """Memory for the keys and values of completions in the making, per process: as many slots as fit are used. null = half
    of what is free when sampling starts."""
    max_staleness: int = 0
    """Sample the completions of the next so many steps while the policy learns from this one's: each step then learns from
    completions of the policy of so many steps ago. 0 = never, and exact. Keeps a copy of the weights to sample from."""
    correction: Literal["none", "truncate", "mask"] | None = None
    """Weight tokens by p(training) / p(sampling), where another policy drew them: capped (TIS), or left out beyond the cap
    (IcePop). none is exact where the policy that trains is the one that sampled. Null = truncate with max_staleness above
    0, and for vllm, whose rounding is its own; else none."""
    correction_cap: float = 2.0
    max_logprob_difference: float | None = None
    """vllm: mean |log p(sampling) - log p(training)| per token that ends the run, at the start and after each step. Null = 1e-3
    in float32, 2e-2 in float16, 0.1 in bfloat16."""
    vllm_mode: Literal["server", "colocate"] = "colocate"
    """vLLM in this process, or a server that launch/vllm_server.py starts. docs/vllm.md"""
    vllm_server_base_url: str | None = None
    """For example http://10.0.0.7:8000. Null = from host and port."""
    vllm_server_host: str = "127.0.0.1"
    vllm_server_port: int = 8000
    vllm_server_timeout: float = 240.0
    """Seconds to wait for the server at the start, and for a sign of life later."""
    vllm_group_port: int = 0
    """Port on the main process's machine through which the server's workers meet it. 0 = any (TRL: 51216)."""
    vllm_weight_transfer: Literal["auto", "nccl", "gloo"] = "auto"
    """How weights travel to a server. auto = nccl from a GPU, else gloo. nccl cannot connect two processes on one GPU."""
    vllm_gpu_memory_utilization: float = 0.3
    """colocate: the share of the GPU's memory that vLLM takes."""
    vllm_max_model_length: int | None = None
    """colocate: tokens of the longest prompt and completion. Null = data.max_prompt_length + max_completion_length."""


@dataclass
class ScoringConfig:
    deadline: float = 60.0
    """Seconds that one reward function may take for a step's completions, in a process of its own that is killed then;
    finding the completions to blame may take as long again."""
    on_error: Literal["mask", "zero", "raise"] = "mask"
    """What becomes of a completion that a reward cannot judge: left out of its group (and counted), 0, or the end."""
    workers: int = 2
    """Processes for each reward that judges completions one by one. 0 = all rewards in the training process, without a
    deadline, every mistake an error: for debugging."""


@dataclass
class TrackingConfig:
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Any of wandb, tensorboard, trackio. metrics.jsonl and rollouts.jsonl are always written."""
    project: str = "GRPO-Fine-Tuning"
    run_name: str | None = None
    """Null = model, data and time."""
    log_completions: bool = True
    """Show a few completions in the terminal now and then, and a table of them in W&B, TensorBoard and trackio."""
    report: bool = True
    """Write report.md and its curves into run_dir at the end."""
    finish_timeout: float = 5.0
    """Seconds that the end of a run waits for W&B to upload what is left, after final/ and report.md; longer is an outage."""


@dataclass
class Config:
    seed: int = 0
    steps: int = 500
    """Training steps: each samples prompts_per_step x num_generations completions and learns from them."""
    num_train_epochs: float | None = None
    """Passes over the training prompts; when set, it decides about `steps`."""
    run_dir: str | None = None
    """Where everything about the run is written. Null = outputs/<run_name>."""
    resume: str | None = None
    """auto = continue from the newest checkpoint in run_dir, if there is one; or the folder of one checkpoint."""
    allow_changes: list[str] = field(default_factory=list)
    """Keys that resume may find changed although that makes it another run, for example [sampling.num_generations]."""
    eval_every: int = 50
    """Held-out evaluation at step 0, every so many steps, and at the end. 0 = never."""
    save_every: int = 100
    """A checkpoint every so many steps, and at the end. 0 = only at the end."""
    save_total_limit: int = 2
    """Checkpoints to keep."""
    rank_timeout: float = 600.0
    """Seconds that processes wait for one of them before the run ends: longer than the longest step or save."""
    prompts_per_step: int = 8
    """P: prompts per step, over all processes."""
    tokens_per_batch: int = 8192
    """Prompt and completion tokens that go through the model at once in training: bounds memory, never changes the
    gradient."""
    rewards: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0, "xml_format": 0.2})
    """Reward function -> weight. Registered names, package.module:function, or path/file.py:function."""
    reward_kwargs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Keyword arguments of reward functions: a name in `rewards` -> {argument: value}."""
    callbacks: list[str] = field(default_factory=list)
    """Your own code during training, mostly more metrics: layer_gradient_norms, package.module:Class, or path/file.py:Class."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def correction_of(rollout: RolloutConfig) -> str:
    """rollout.correction, or what null means."""
    return rollout.correction or ("truncate" if rollout.max_staleness or rollout.engine == "vllm" else "none")


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain values, ready for YAML."""
    return dataclasses.asdict(config)


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}. `rewards` and `reward_kwargs` stay one value: their names may hold dots."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and path not in ("rewards", "reward_kwargs", "objective.loss_kwargs"):
            flat.update(flatten(value, path + "."))
        else:
            flat[path] = value
    return flat
