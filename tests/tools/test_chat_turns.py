"""Chat with the tools of a run: all turns of an answer, and the results between them."""

from pathlib import Path

import pytest

from grpo.errors import ConfigError
from grpo.tools.chat_models import load_chat_models
from tests.compat.test_turns import call, folder_of


@pytest.mark.slow
def test_chat_runs_the_tools_of_the_run_where_it_is_asked_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_of(tmp_path / "run" / "final", [call("calculator", expression=f"{n}*3") for n in range(1, 10)])
    settings = "tools: [calculator]\nturns: {workers: 0}\ndata: {system_prompt: null}\n"
    (tmp_path / "run" / "config.yaml").write_text(settings)
    [model] = load_chat_models(folder, with_tools=True).values()
    found = 0
    for seed in range(8):
        *_, text = model.stream_answer("3*3?", max_completion_length=300, temperature=1.0, seed=seed)
        turns = text.split("[assistant]\n")
        for turn in turns[:-1]:  # the results stand behind the calls of their turn, in order
            said, *results = turn.split("\n[tool calculator]\n")
            asked = [int(part.partition("*")[0]) for part in said.split('"expression": "')[1:]]
            assert [int(result) for result in results] == [3 * number for number in asked]
            found += len(results)
    assert found > 3
    [plain] = load_chat_models(folder).values()
    assert plain.turns is None and "has tools (calculator), which are not run" in caplog.text
    with pytest.raises(ConfigError, match="belongs to no run with tools"):
        load_chat_models(folder_of(tmp_path / "alone", []), with_tools=True)
