"""Export: a run directory -> a folder for others: merged, adapter, or gguf-ready for Ollama and llama.cpp.

    merged        what AutoModelForCausalLM.from_pretrained loads; a LoRA adapter is merged into its base
    adapter       adapter_model.safetensors and adapter_config.json, as peft and vLLM load them (runs with lora.r)
    gguf-ready    merged, and a Modelfile: `ollama create NAME -f Modelfile` converts the folder by itself

From final/, or from any checkpoint: a run that was stopped can be exported too.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.config.parser import load_config
from grpo.config.schema import Config, DataConfig
from grpo.data.prompts import SYSTEM_PROMPT
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError, StorageError
from grpo.models.loading import load_model
from grpo.models.lora import add_adapter, save_adapter
from grpo.models.weights import WeightReader, save_full_weights
from grpo.run.checkpoint import load_checkpoint
from grpo.tracking.run_reader import RunFolder

FORMATS = ("merged", "adapter", "gguf-ready")


def export(run_dir: Path, kind: str, output: Path | None = None, step: int | None = None) -> Path:
    """Writes the folder (default: run_dir/export/<kind>) and returns it. `step`: a checkpoint instead of final/.

    Raises ConfigError for what the run cannot give, StorageError for what cannot be read or written.
    """
    config = config_of(run_dir)
    if kind not in FORMATS:
        raise ConfigError(f"--format is {kind}, knows {', '.join(FORMATS)}")
    if kind == "adapter" and config.lora.r is None:
        raise ConfigError(
            f"--format adapter: {run_dir} was trained without lora.r, so it has none: use --format merged"
        )
    if step is None and not (run_dir / "final").is_dir():
        found = sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))
        have = f"it has checkpoints of step {', '.join(map(str, found))}: add --step" if found else "and no checkpoint"
        raise ConfigError(f"{run_dir} has no final/: the run did not end; {have}")
    folder = output or run_dir / "export" / kind
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: remove it, or set another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if step is not None:
            _from_checkpoint(run_dir, config, step, folder, adapter_only=kind == "adapter")
        else:
            shutil.copytree(run_dir / ("adapter" if kind == "adapter" else "final"), folder, dirs_exist_ok=True)
        if kind == "gguf-ready":
            tokenizer = load_tokenizer(str(folder))
            (folder / "Modelfile").write_text(modelfile(tokenizer, config), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot export {run_dir} to {folder}: {error}") from error
    return folder


def config_of(run_dir: Path) -> Config:
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir} is no run directory: it has no config.yaml")
    return load_config([f"--config={path}"])


def _from_checkpoint(run_dir: Path, config: Config, step: int, folder: Path, *, adapter_only: bool) -> None:
    """The base of the run with the checkpoint's weights in it, on the CPU."""
    path = run_dir / "checkpoints" / f"step-{step}"
    if not path.is_dir():
        raise ConfigError(f"--step {step}: there is no {path}")
    base = RunFolder(run_dir).base_model() or config.model.name
    model = load_model(base, config.model)
    adapter = add_adapter(model, config.lora, base=base) if config.lora.r is not None else None
    weights = load_checkpoint(path)[0]["model"]
    model.load_state_dict(weights, strict=False)
    if adapter_only:
        assert adapter is not None
        save_adapter(adapter, folder)
        return
    if adapter is None:
        model.tie_weights()
    save_full_weights(model, WeightReader(), folder)
    load_tokenizer(base, config.model.gguf_file).save_pretrained(folder)


def modelfile(tokenizer: PreTrainedTokenizerBase, config: Config) -> str:
    """Ollama's Modelfile: the chat template in its own (Go's) language, the system prompt and temperature of training.

    Raises ConfigError where the template is not one after another of fixed text and messages, which is all that Ollama can say.
    """
    ends = [tokenizer.eos_token] if tokenizer.eos_token else []
    lines = ["FROM .", f"TEMPLATE {_quoted(go_template(tokenizer))}"]
    system = system_prompt(config.data)
    if system:
        lines.append(f"SYSTEM {_quoted(system)}")
    lines.append(f"PARAMETER temperature {config.sampling.temperature}")
    lines += [f"PARAMETER stop {json.dumps(end)}" for end in ends]
    return "\n".join(lines) + "\n"


def system_prompt(data: DataConfig) -> str | None:
    return SYSTEM_PROMPT if data.system_prompt == "xml" else data.system_prompt


def go_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template in Go's language, in fixed texts that are read off a rendered chat.

    # system S, user U, assistant A, user U   ->  p0 S p1 U p2 A p3 U p2
    # user U                                  ->  q0 U p2          q0 may hold a system prompt of the template's own
    """
    if not tokenizer.chat_template:
        return "{{ .Prompt }}"
    p0, p1, p2, p3, last = _between(tokenizer, ["system", "user", "assistant", "user"])
    q0, opening = _between(tokenizer, ["user"])
    if (last, opening) != (p2, p2):
        raise ConfigError(
            "--format gguf-ready: this chat template treats messages differently by their place, which Ollama's cannot say. "
            "Use --format merged, and let llama.cpp convert the folder: it keeps the template as it is"
        )
    text = {
        name: json.dumps(part, ensure_ascii=False) for name, part in zip("abcdq", (p0, p1, p2, p3, q0), strict=True)
    }
    return (
        f"{{{{ if .System }}}}{{{{ {text['a']} }}}}{{{{ .System }}}}{{{{ {text['b']} }}}}"
        f"{{{{ else }}}}{{{{ {text['q']} }}}}{{{{ end }}}}"
        f'{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{{{{ {text["c"]} }}}}'
        f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{{{{ {text["d"]} }}}}{{{{ end }}}}{{{{ end }}}}'
    )


def _between(tokenizer: PreTrainedTokenizerBase, roles: list[str]) -> list[str]:
    """The fixed texts before, between and after messages of these roles; the last one asks the assistant to speak."""
    marks = [f"MESSAGE{index}ENDS" for index in range(len(roles))]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    try:
        rest: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # the template's own refusals
        raise ConfigError(f"--format gguf-ready: the chat template refuses a {roles[0]} message: {error}") from error
    parts = []
    for mark in marks:
        before, found, rest = str(rest).partition(mark)
        if not found:
            raise ConfigError("--format gguf-ready: the chat template changes messages. Use --format merged")
        parts.append(before)
    return [*parts, str(rest)]


def _quoted(text: str) -> str:
    return f'"""{text}"""'
