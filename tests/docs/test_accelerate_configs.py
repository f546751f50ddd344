"""Every accelerate_configs/*.yaml is read by accelerate with the intended meaning."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

FOLDER = Path(__file__).parents[2] / "accelerate_configs"
FILES = sorted(FOLDER.glob("*.yaml"))


def read(path: Path) -> ClusterConfig:
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    return config


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_it_and_its_comment_says_how_to_launch_it(path: Path) -> None:
    config = read(path)

    assert config.num_processes >= 1
    comment = path.read_text().split("compute_environment")[0]
    assert comment.startswith("# ")
    assert "# To edit: " in comment
    assert f"accelerate launch --config_file accelerate_configs/{path.name}" in comment


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_is_a_word_not_false(path: Path) -> None:
    """Unquoted NO is `false` in YAML, so it must be quoted for accelerate."""
    config = read(path)

    assert isinstance(config.mixed_precision, str)
    assert config.mixed_precision in {"no", "bf16", "fp16"}
    assert config.distributed_type is not False


@pytest.mark.parametrize(
    "name, distributed_type, use_cpu, processes, precision",
    [
        ("cpu", "NO", True, 1, "no"),
        ("cpu_2proc", "MULTI_GPU", True, 2, "no"),
        ("single_gpu", "NO", False, 1, "bf16"),
        ("single_gpu_fp16", "NO", False, 1, "fp16"),
        ("multi_gpu", "MULTI_GPU", False, 8, "bf16"),
        ("fsdp2", "FSDP", False, 8, "bf16"),
        ("multi_node_fsdp2", "FSDP", False, 16, "bf16"),
        ("deepspeed_zero2", "DEEPSPEED", False, 8, "bf16"),
        ("deepspeed_zero3", "DEEPSPEED", False, 8, "bf16"),
        ("mps", "NO", False, 1, "no"),
        ("one_process", "NO", False, 1, "no"),
    ],
)
def test_values(name: str, distributed_type: str, use_cpu: bool, processes: int, precision: str) -> None:
    config = read(FOLDER / f"{name}.yaml")

    assert config.distributed_type == distributed_type
    assert config.use_cpu is use_cpu
    assert config.num_processes == processes
    assert config.mixed_precision == precision


def test_every_file_has_its_row_above() -> None:
    assert {path.stem for path in FILES} == {
        *("cpu", "cpu_2proc", "single_gpu", "single_gpu_fp16", "multi_gpu", "fsdp2", "multi_node_fsdp2"),
        *("deepspeed_zero2", "deepspeed_zero3", "mps", "one_process"),
    }


@pytest.mark.parametrize("name", ["fsdp2", "multi_node_fsdp2"])
def test_fsdp_is_version_2_and_shards_layer_by_layer(name: str) -> None:
    settings = read(FOLDER / f"{name}.yaml").fsdp_config
    assert settings["fsdp_version"] == 2
    assert settings["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_stage(stage: int) -> None:
    assert read(FOLDER / f"deepspeed_zero{stage}.yaml").deepspeed_config["zero_stage"] == stage
