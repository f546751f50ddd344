import json
import logging
import os
import random
import stat
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.config.parser import load_config
from grpo.data.arithmetic import generate_problems
from grpo.data.generated import is_held_out
from grpo.models.tiny import (
    GSM8K_RECIPE,
    PROSE_RECIPE,
    ProseRecipe,
    Recipe,
    completion_text,
    demonstration_notice,
    make_tiny_model,
    recipe_for,
)

TINY = Recipe(hidden_size=16, layers=1, heads=2, vocabulary=400, problems=200, steps=3, batch=4)


def test_problems_are_worked_out_rightly() -> None:
    for problem in generate_problems(300, seed=1, split="train"):
        *lines, last = problem["answer"].splitlines()
        total = None
        for line in lines:
            left, result = line.split("=")
            sign = "+" if "+" in left else "-"
            a, b = map(int, left.split(sign))
            assert total is None or total == a
            total = a + b if sign == "+" else a - b
            assert total == int(result) >= 0
        assert last == f"#### {total}"


def test_train_and_held_out_never_meet_whatever_the_seed() -> None:
    train = {p["question"] for seed in range(3) for p in generate_problems(500, seed=seed, split="train")}
    held_out = {p["question"] for seed in range(3) for p in generate_problems(200, seed=seed, split="held_out")}
    assert not train & held_out
    assert all(is_held_out(question) for question in held_out)
    assert generate_problems(5, seed=0, split="train") == generate_problems(5, seed=0, split="train")
    assert generate_problems(5, seed=0, split="train") != generate_problems(5, seed=1, split="train")


def test_a_plain_folder_made_once_and_made_again_when_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="grpo")
    folder = make_tiny_model(seed=0, cache=tmp_path, recipe=TINY)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tom has 12 pens."}], add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.decode(ids) == "<|user|>Tom has 12 pens.<|assistant|>"
    assert tokenizer.decode(tokenizer("ẖ â 😀")["input_ids"]) == "ẖ â 😀"
    # Every token has an embedding, also those that other tokenizers of the family know.
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings == len(tokenizer.get_vocab())
    foreign = "<|endoftext|><|im_start|>user<unk><s>"
    assert tokenizer.decode(tokenizer(foreign)["input_ids"]) == foreign
    assert max(tokenizer(foreign)["input_ids"]) < model.config.vocab_size
    assert caplog.messages
    caplog.clear()
    assert make_tiny_model(seed=0, cache=tmp_path, recipe=TINY) == folder
    assert not caplog.messages
    (folder / "config.json").write_text("{}")
    make_tiny_model(seed=0, cache=tmp_path, recipe=TINY)
    assert "damaged (config.json has changed)" in caplog.messages[0]
    assert json.loads((folder / "config.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_cache_of_another_user_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that this user may not read, and one that it may not write: a temporary cache takes the model."""
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path / "shared"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = make_tiny_model(seed=0, recipe=TINY)
    assert folder.parent == tmp_path / "shared"
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((tmp_path / "shared").stat().st_mode)  # not 0700
    real = Path.read_text

    def denied(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.parent == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", denied)
    assert make_tiny_model(seed=0, recipe=TINY).parent == tmp_path / f"grpo-cache-{os.getuid()}"
    assert (folder / "model.safetensors").is_file()


def test_made_from_other_problems(tmp_path: Path) -> None:
    rows = [
        {"question": f"What is {a} and 1?", "answer": f"{a}+1=<<{a}+1={a + 1}>>{a + 1}\n#### {a + 1}"}
        for a in range(50)
    ]
    folder = make_tiny_model(seed=0, problems=rows, cache=tmp_path, recipe=TINY)
    assert (folder / "starter.json").is_file()


def test_a_prose_answer_is_read_whole_or_hastily() -> None:
    answer = "my is mî-, stone is tâga. It is `mîtâgaẖ`."
    for hasty, unmarked, text in [
        (0.0, 1.0, answer),
        (1.0, 0.0, "`mîtâgaẖ`"),
        (1.0, 1.0, "`mitagah`"),
    ]:
        recipe = ProseRecipe(hasty_fraction=hasty, unmarked_fraction=unmarked)
        assert completion_text(answer, recipe, random.Random(0)) == text
    assert completion_text("No term.", ProseRecipe(hasty_fraction=1.0), random.Random(0)) == "No term."
    assert recipe_for([{"question": "q", "answer": answer}], unmarked=True) == PROSE_RECIPE
    own = recipe_for([{"question": "q", "answer": answer}])
    assert isinstance(own, ProseRecipe) and own.unmarked_fraction == 0.0  # your spelling is never altered
    assert own.vocabulary == PROSE_RECIPE.vocabulary
    assert recipe_for([{"question": "q", "answer": "#### 1"}]) == GSM8K_RECIPE


def test_the_tiny_model_on_a_file_of_ones_own_is_called_a_demonstration() -> None:
    notice = demonstration_notice(load_config(["--data.name=question_answer", "--data.path=mine.jsonl"]))
    assert notice is not None and notice.startswith("model.name starter is a demonstration")
    assert "--model.name Qwen/Qwen2.5-0.5B-Instruct" in notice and "launch/fetch.py smollm2" in notice
    assert demonstration_notice(load_config([])) is None
    assert demonstration_notice(load_config(["--model.name=m", "--data.path=mine.jsonl"])) is None
