"""Export and GGUF: a GGUF base is trained and exported in every format; each export is the trained policy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from grpo.config.parser import load_config
from grpo.config.schema import ModelConfig
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError
from grpo.models.loading import load_model
from grpo.models.lora import load_adapter
from grpo.tools.chat_models import load_chat_models
from grpo.tools.check_config import check
from grpo.tools.evaluate import config_for
from grpo.tools.evaluate_model import compare_models
from grpo.tools.export import export, go_template, main
from grpo.tools.saved_model import resolve_base
from grpo.tracking.model_card import model_card
from grpo.tracking.run_reader import RunFolder
from grpo.trainer import train
from tests.fakes import tiny_data, tiny_folder, tiny_model
from tests.gguf_files import chat_tokenizer, write_gguf

pytest.importorskip("gguf")
IDS = torch.tensor([[40, 41, 42, 43, 60, 90]])
ROOT = Path(__file__).parents[2]


def chat_model(seed: int = 0) -> PreTrainedModel:
    tokenizer = chat_tokenizer()
    model = tiny_model(
        vocab_size=len(tokenizer), spread=2.0, seed=seed, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )
    model.set_attn_implementation("sdpa")
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def run(tmp_path: Path, name: str, **changes: object) -> Path:
    settings = {
        "data.path": tiny_data(tmp_path / "data.jsonl"),
        "run_dir": tmp_path / name,
        "steps": 2,
        "prompts_per_step": 2,
        "sampling.num_generations": 4,
        "sampling.max_completion_length": 6,
        "optimizer.learning_rate": 0.01,
        "eval_every": 0,
        "save_every": 1,
        "scoring.workers": 0,
        "tracking.report_to": "[]",
        "tracking.report": "false",
        "rewards": '{"tests.letters:count_letters": 1.0}',
    } | changes
    return train(load_config([f"--{key}={value}" for key, value in settings.items()]))


@pytest.mark.parametrize(("quantized", "most"), [(False, 0.0), (True, 0.05)])
def test_a_gguf_is_the_model_and_the_tokenizer_that_it_was_made_of(
    tmp_path: Path, quantized: bool, most: float
) -> None:
    model, tokenizer = chat_model(), chat_tokenizer()
    write_gguf(tmp_path / "model.gguf", model, tokenizer, quantized=quantized)
    loaded = load_model(str(tmp_path), ModelConfig(name=str(tmp_path), gguf_file="model.gguf"))
    assert float((logits(loaded) - logits(model)).abs().max()) <= most
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    again = load_tokenizer(str(tmp_path), "model.gguf")
    text = "what is 2 + 3? ünïcode <|im_end|>"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert (again.chat_template, again.eos_token) == (tokenizer.chat_template, tokenizer.eos_token)


def test_a_gguf_file_is_a_model_name_everywhere(tmp_path: Path) -> None:
    """LoRA on a .gguf file, with the same file as reference: evaluate, chat, check, PEFT and export find the base."""
    base = write_gguf(tmp_path / "base.gguf", chat_model(), chat_tokenizer(), quantized=True)
    shown = [{"question": "1+1=", "completion": "two"}]
    settings = {"model.name": base, "model.reference": base, "lora.r": 2, "data.examples": json.dumps(shown)}
    run_dir = run(tmp_path, "run", steps=1, **settings)
    assert json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["policy/kl"] == 0.0
    final = AutoModelForCausalLM.from_pretrained(run_dir / "final")
    saved, original = AutoTokenizer.from_pretrained(run_dir / "final"), chat_tokenizer()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(saved, name) == getattr(original, name), name
    assert final.generation_config.eos_token_id == original.eos_token_id
    readme = (run_dir / "adapter" / "README.md").read_text()
    assert "A LoRA adapter of rank 2" in readme and "[More Information Needed]" not in readme  # peft's template
    adapted = AutoPeftModelForCausalLM.from_pretrained(str(run_dir / "adapter"))
    assert torch.allclose(logits(adapted), logits(final), atol=1e-5)
    assert RunFolder(run_dir).base_model() == str(base)
    model = str(run_dir / "final")
    config = config_for(model, [f"--data.path={tmp_path / 'data.jsonl'}"])
    report, _ = compare_models(config, model, resolve_base(model, "run"), 1, Accelerator())
    assert report["base"]["items"] == report["items"] > 0
    models = load_chat_models(model, str(base))
    assert models["base"].data.examples == shown
    assert len([list(model.stream_answer("1+2=", max_completion_length=2)) for model in models.values()]) == 2
    found = check(load_config([f"--config={run_dir / 'config.yaml'}", f"--run_dir={tmp_path / 'new'}"]))
    assert found.rows == 12 and len(found.prompts) == 2
    folder = export(run_dir, "gguf-ready")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(final))
    lines = (folder / "Modelfile").read_text()
    assert "completion: two" in str(model_card(run_dir))
    assert 'MESSAGE user """1+1="""\nMESSAGE assistant """two"""\n' in lines


def test_round_trip_gguf_to_policy_to_gguf(tmp_path: Path) -> None:
    """Train a GGUF base. gguf-ready, converted like Ollama does, has the logits of the trained policy."""
    base = tmp_path / "base"
    base.mkdir()
    start, tokenizer = chat_model(), chat_tokenizer()
    write_gguf(base / "model.gguf", start, tokenizer, quantized=False)
    run_dir = run(tmp_path, "run", **{"model.name": base, "model.gguf_file": "model.gguf"})
    folder = export(run_dir, "gguf-ready")
    trained = AutoModelForCausalLM.from_pretrained(folder)
    assert float((logits(trained) - logits(start)).abs().max()) > 0.01
    write_gguf(tmp_path / "out.gguf", trained, AutoTokenizer.from_pretrained(folder), quantized=False)
    again = load_model(str(tmp_path), ModelConfig(name=str(tmp_path), gguf_file="out.gguf"))
    assert torch.equal(logits(again), logits(trained))
    lines = (folder / "Modelfile").read_text()
    assert lines.startswith("FROM .\nTEMPLATE ")
    assert 'SYSTEM """Respond in the following format:\n<reasoning>' in lines
    assert 'PARAMETER temperature 1.0\nPARAMETER stop "<|im_end|>"\n' in lines


def render(template: str, system: str, messages: list[tuple[str, str]]) -> str:
    """Render the one shape of template that go_template writes, as Go does."""
    pieces = [json.loads(f'"{piece}"') for piece in _strings(template)]
    first, second, otherwise, after_user, after_assistant = pieces
    text = first + system + second if system else otherwise
    after = {"user": after_user, "assistant": after_assistant}
    return text + "".join(content + after[role] for role, content in messages)


def _strings(template: str) -> list[str]:
    return [part[1:-1] for part in template.replace("{{ ", "\0").replace(" }}", "\0").split("\0") if part[:1] == '"']


def test_the_ollama_template_says_what_the_chat_template_says() -> None:
    tokenizer = chat_tokenizer()
    template = go_template(tokenizer)
    chat = [("user", "2+2?"), ("assistant", "4"), ("user", 'and "3"?\n')]
    for system in ("Be brief.", ""):
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": role, "content": content} for role, content in chat]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert render(template, system, chat) == expected
    tokenizer.chat_template = None
    assert go_template(tokenizer) == "{{ .Prompt }}"


def test_the_ollama_template_of_a_template_with_settings_and_without_a_system_role() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}[{{ mode }}]"
        "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}assistant: "
    )
    template = go_template(tokenizer, {"mode": "brief"})
    chat = [("user", "2+2?"), ("assistant", "4"), ("user", "3?")]
    turns = "2+2?;assistant: 4;user: 3?;assistant: "
    assert render(template, "Be exact.", chat) == f"[brief]user: Be exact.\n\n{turns}"
    assert render(template, "", chat) == f"[brief]user: {turns}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content | trim | upper }}", "the chat template changes messages"),
        ("{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}>", "depends on a message's position"),
        ("{{ raise_exception('no system') }}", "refuses a system message"),
    ],
)
def test_a_template_that_ollama_cannot_say_is_refused(template: str, message: str) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=message):
        go_template(tokenizer)


def test_every_format_of_a_lora_run_and_of_its_checkpoints_is_the_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_folder(tmp_path / "model")
    more = {"model.name": base, "lora.r": 4, "data.system_prompt": "null"}
    run_dir = run(tmp_path, "run", **more)
    expected = AutoModelForCausalLM.from_pretrained(run_dir / "final")
    ids = IDS % 42

    def of(model: PreTrainedModel) -> torch.Tensor:
        with torch.no_grad():
            return model(ids).logits

    merged = AutoModelForCausalLM.from_pretrained(export(run_dir, "merged"))
    assert torch.equal(of(merged), of(expected))
    adapted = load_adapter(load_model(str(base)), export(run_dir, "adapter"))
    assert torch.allclose(of(adapted), of(expected), atol=1e-5)
    last = AutoModelForCausalLM.from_pretrained(export(run_dir, "merged", tmp_path / "last", step=2))
    assert torch.allclose(of(last), of(expected), atol=1e-6)
    adapter = load_adapter(load_model(str(base)), export(run_dir, "adapter", tmp_path / "adapter", step=2))
    assert torch.allclose(of(adapter), of(expected), atol=1e-5)
    first = AutoModelForCausalLM.from_pretrained(export(run_dir, "merged", tmp_path / "first", step=1))
    assert float((of(first) - of(expected)).abs().max()) > 1e-4
    main(["--run", str(run_dir), "--format", "adapter", "--output", str(tmp_path / "card")])
    assert f"Use it: vllm serve {base} --enable-lora --lora-modules mine={tmp_path}/card" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="is not empty"):
        export(run_dir, "merged")
    with pytest.raises(ConfigError, match="--step 9: there is no"):
        export(run_dir, "merged", tmp_path / "none", step=9)


def test_what_cannot_be_exported_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run directory"):
        export(tmp_path, "merged")
    (tmp_path / "config.yaml").write_text("model:\n  name: somewhere\n")
    with pytest.raises(ConfigError, match="trained without lora.r"):
        export(tmp_path, "adapter")
    with pytest.raises(ConfigError, match="has no final/: the run did not end; and no checkpoint"):
        export(tmp_path, "merged")
    with pytest.raises(ConfigError, match="it must be one of merged, adapter, gguf-ready"):
        export(tmp_path, "onnx")


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    run_dir = run(tmp_path, "run", **{"model.name": tiny_folder(tmp_path / "model"), "data.system_prompt": "null"})
    command = [sys.executable, str(ROOT / "launch" / "export.py"), "--run", str(run_dir), "--format"]
    done = subprocess.run([*command, "gguf-ready"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"ollama create mine -f {run_dir}/export/gguf-ready/Modelfile" in done.stdout
    refused = subprocess.run([*command, "adapter"], capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "trained without lora.r" in refused.stderr
