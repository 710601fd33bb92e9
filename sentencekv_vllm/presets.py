# SPDX-License-Identifier: Apache-2.0
"""The named presets in `configs/`, in the form that `vllm serve --config` takes.

`sentencekv presets NAME` prints the path of one, for the command line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from .config import ConfigError, SentenceKVConfig, closest

PACKAGE = Path(__file__).resolve().parent


def preset_paths() -> dict[str, Path]:
    """File of every preset by name: package data of a wheel, or those of a checkout."""
    folders = (PACKAGE / "configs", PACKAGE.parent / "configs")
    return {path.stem: path for folder in folders for path in sorted(folder.rglob("*.yaml"))}


def preset_path(name: str) -> Path:
    """File of one preset.

    Raises:
        ConfigError: there is none of that name.
    """
    paths = preset_paths()
    if name not in paths:
        raise ConfigError(f"unknown preset {name!r}: {closest(name, list(paths))}")
    return paths[name]


def load_preset(name: str) -> SentenceKVConfig:
    """Our settings of a preset, checked."""
    arguments = yaml.safe_load(preset_path(name).read_text())
    return SentenceKVConfig.from_dict(arguments["additional-config"]["sentencekv"])


def main(arguments: Sequence[str]) -> int:
    """Print the path of the preset that is named, or the names; the exit status."""
    try:
        print(preset_path(arguments[0]) if arguments else "\n".join(preset_paths()))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
