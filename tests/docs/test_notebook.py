"""The companion notebook: small, without stored outputs, and executed from top to bottom."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason='pip install -e ".[test]"')
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "walkthrough.ipynb"


def test_it_is_valid_small_and_holds_no_output() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 200_000
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            compile(cell.source, "cell", "exec")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU without keys: train the tiny model, plot, chat, evaluate, and train with a custom reward and data."""
    from nbclient import NotebookClient

    monkeypatch.setenv("WALKTHROUGH_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=1500, kernel_name="python3", resources={"metadata": {"path": NOTEBOOK.parent}}
    )
    client.execute()
    printed = "\n".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream"
    )
    pictures = sum(
        "image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert pictures >= 2  # the curves that moved, and the report's
    assert "--- base" in printed and "--- trained" in printed and "change" in printed
    assert "ready to train" in printed and "reward/accuracy/mean" in printed
    assert (tmp_path / "starter" / "final" / "model.safetensors").is_file()
    assert (tmp_path / "mine" / "adapter" / "adapter_config.json").is_file()
    assert printed.count("'rewards/names_the_number/mean'") == 3 and (tmp_path / "trl" / "final").is_dir()
