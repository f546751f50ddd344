"""Export a run: a merged model, its LoRA adapter alone, or a folder that Ollama converts to GGUF.

    grpo export --run DIR --format merged|adapter|gguf-ready [--output DIR] [--step N]
                [--licence apache-2.0] [--push OWNER/NAME [--public]]

    merged        a plain Hugging Face model folder; a LoRA adapter is merged into its base
    adapter       adapter_model.safetensors and adapter_config.json, as peft and vLLM load them (runs with lora.r)
    gguf-ready    merged, with a Modelfile: `ollama create NAME -f Modelfile` converts the folder

Source: final/, or with --step any checkpoint, also of a run that was stopped. The folder gets a model card with the
run's settings, evaluation and data. --push uploads the folder, if the data's card permits it.
"""

import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.config.parser import load_config
from grpo.config.schema import Config, DataConfig
from grpo.data.prompts import SYSTEM_PROMPT, messages_for
from grpo.data.rendering import apply_template, moves_system_text
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError, StorageError
from grpo.models.loading import load_model
from grpo.models.lora import add_adapter, save_adapter
from grpo.models.weights import WeightReader, save_dtype, save_full_weights
from grpo.run.checkpoint import load_checkpoint
from grpo.run.final import final_step
from grpo.tools.arguments import command_parser
from grpo.tools.replay import checkpoint_steps
from grpo.tracking.run_reader import RunFolder
from grpo.types import Message

FORMATS = {
    "merged": 'from transformers import pipeline; pipeline("text-generation", "{folder}")',
    "adapter": "vllm serve {base} --enable-lora --lora-modules mine={folder}",
    "gguf-ready": "ollama create mine -f {folder}/Modelfile",
}
"""Format -> how to use the exported folder."""


def main(argv: list[str]) -> None:
    """Run the command `grpo export`."""
    parser = command_parser("export", __doc__)
    parser.add_argument("--run", required=True, type=Path, help="the run directory")
    parser.add_argument("--format", required=True, choices=list(FORMATS))
    parser.add_argument("--output", type=Path, help="the folder to write; default: RUN/export/FORMAT")
    parser.add_argument("--step", type=int, help="export this checkpoint instead of final/")
    parser.add_argument("--licence", help="the model's licence for its card, by its name on the hub (apache-2.0, ...)")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload it to the hub with the key HF_TOKEN")
    parser.add_argument("--public", action="store_true", help="with --push: visible to everybody; default: private")
    options = parser.parse_args(argv)
    from grpo.data.card import publishable
    from grpo.tracking.model_card import model_card, publish

    if options.push:
        publishable(options.run)  # before anything is written
    folder = export(options.run, options.format, options.output, options.step)
    about = {"licence": options.licence, "step": final_step(options.run) if options.step is None else options.step}
    model_card(options.run, **about).save(folder / "README.md")
    base = RunFolder(options.run).base_model() or config_of(options.run).model.name
    print(f"{folder}\nUse it: {FORMATS[options.format].format(folder=folder, base=shlex.quote(base))}")
    if options.push:
        address = publish(options.run, folder, options.push, private=not options.public, **about)
        print(f"Pushed: {address}")


def export(run_dir: Path, kind: str, output: Path | None = None, step: int | None = None) -> Path:
    """Write the exported folder.

    Args:
        run_dir: The run.
        kind: One of FORMATS.
        output: The folder; default run_dir/export/<kind>.
        step: Export this checkpoint instead of final/.

    Returns:
        The folder.

    Raises:
        ConfigError: The run has no such format or step, or the folder is not empty.
        StorageError: A file cannot be read or written.
    """
    config = config_of(run_dir)
    if kind not in FORMATS:
        raise ConfigError(f"--format is {kind}, it must be one of {', '.join(FORMATS)}")
    if kind == "adapter" and config.lora.r is None:
        raise ConfigError(
            f"--format adapter: {run_dir} was trained without lora.r and has no adapter: use --format merged"
        )
    if step is None and not (run_dir / "final").is_dir():
        steps = checkpoint_steps(run_dir)
        have = f"it has checkpoints of step {', '.join(map(str, steps))}: add --step" if steps else "and no checkpoint"
        raise ConfigError(f"{run_dir} has no final/: the run did not end; {have}")
    of = final_step(run_dir)
    newest = max(checkpoint_steps(run_dir), default=0)
    if step is None and _is_older(run_dir, of, newest):
        at = "an earlier step" if of is None else f"step {of}"
        raise ConfigError(
            f"{run_dir / 'final'} is of {at}, and the run has a checkpoint of step {newest}: add --step {newest}, or "
            "finish the run with --resume auto, which writes final/"
            + ("" if of is None else f" (--step {of} exports final/ as it is)")
        )
    if step == of and not (run_dir / "checkpoints" / f"step-{step}").is_dir():
        step = None  # the checkpoint was pruned, and final/ has the same weights
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


def _is_older(run_dir: Path, of: int | None, newest: int) -> bool:
    """Return whether final/ is of an earlier step than the newest checkpoint.

    final/ of an older version does not record its step. It was written right after the last checkpoint.
    """
    if of is not None:
        return of < newest
    final, checkpoint = run_dir / "final" / "config.json", run_dir / "checkpoints" / f"step-{newest}" / "manifest.json"
    if not (final.is_file() and checkpoint.is_file()):
        return False
    return final.stat().st_mtime < checkpoint.stat().st_mtime - 60


def config_of(run_dir: Path) -> Config:
    """Return the config of a run. Raises ConfigError for a folder that is not a run directory."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir} is not a run directory: it has no config.yaml")
    return load_config([f"--config={path}"])


def _from_checkpoint(run_dir: Path, config: Config, step: int, folder: Path, *, adapter_only: bool) -> None:
    """Write the run's base model with the weights of a checkpoint, on the CPU."""
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
    save_full_weights(model, WeightReader(), folder, dtype=save_dtype(config, base))
    load_tokenizer(base, config.model.gguf_file).save_pretrained(folder)


def modelfile(tokenizer: PreTrainedTokenizerBase, config: Config) -> str:
    """Return Ollama's Modelfile: chat template in Go's language, system prompt, worked examples, temperature.

    Raises ConfigError for a template that is not a sequence of fixed texts and messages: Ollama supports no others.
    """
    ends = [tokenizer.eos_token] if tokenizer.eos_token else []
    lines = ["FROM .", f"TEMPLATE {_quoted(go_template(tokenizer, config.data.chat_template_kwargs))}"]
    system = system_prompt(config.data)
    if system:
        lines.append(f"SYSTEM {_quoted(system)}")
    turns = [message for message in messages_for("", config.data)[:-1] if message["role"] != "system"]
    lines += [f"MESSAGE {turn['role']} {_quoted(turn['content'])}" for turn in turns]
    lines.append(f"PARAMETER temperature {config.sampling.temperature}")
    lines += [f"PARAMETER stop {json.dumps(end)}" for end in ends]
    return "\n".join(lines) + "\n"


def system_prompt(data: DataConfig) -> str | None:
    """Return the system prompt's text, or None."""
    return SYSTEM_PROMPT if data.system_prompt == "xml" else data.system_prompt


def go_template(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None) -> str:
    """Return the chat template in Go's template language. The fixed texts are extracted from a rendered chat.

    # system S, user U, assistant A, user U   ->  p0 S p1 U p2 A p3 U p2
    # user U                                  ->  q0 U p2          q0 may hold the template's default system prompt
    """
    if not tokenizer.chat_template:
        return "{{ .Prompt }}"
    kwargs = template_kwargs or {}
    if moves_system_text(tokenizer, kwargs):  # as in training: before the first question
        (p0, p2, p3, last), p1 = _between(tokenizer, ["user", "assistant", "user"], kwargs), "\n\n"
    else:
        p0, p1, p2, p3, last = _between(tokenizer, ["system", "user", "assistant", "user"], kwargs)
    q0, opening = _between(tokenizer, ["user"], kwargs)
    if (last, opening) != (p2, p2):
        raise ConfigError(
            "--format gguf-ready: this chat template depends on a message's position, which Ollama does not support. "
            "Use --format merged, and convert the folder with llama.cpp, which keeps the template"
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


def _between(tokenizer: PreTrainedTokenizerBase, roles: list[str], kwargs: Mapping[str, Any]) -> list[str]:
    """Return the fixed texts before, between and after messages of these roles. The last one opens the answer."""
    marks = [f"MESSAGE{index}ENDS" for index in range(len(roles))]
    messages: list[Message] = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    try:
        [rest] = apply_template([messages], tokenizer, kwargs, tokenize=False)
    except Exception as error:  # raised by the template itself
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
