# SPDX-License-Identifier: Apache-2.0
"""The named presets in `configs/`, in the form that `vllm serve --config` takes.

`sentencekv presets NAME` prints the path of one, for the command line.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .bounds import shown
from .cli.complaint import MISUSED, complain
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
    if not isinstance(name, str) or name not in paths:
        raise ConfigError(f"unknown preset {shown(name)}: {closest(name, list(paths))}")
    return paths[name]


def load_preset(name: str) -> SentenceKVConfig:
    """Our settings of a preset, checked."""
    return SentenceKVConfig.from_dict(_written(name))


def _written(name: str) -> dict[str, Any]:
    arguments = yaml.safe_load(preset_path(name).read_text())
    settings: dict[str, Any] = arguments["additional-config"]["sentencekv"]
    return settings


def with_preset(values: Any) -> Any:
    """Settings over those of the preset that they name: `{"preset": "quality", "retention": 3}`.

    vLLM replaces `additional_config` of a file as a whole where the command line has one, so a
    setting beside `--config FILE` would be the only one.

    Raises:
        ConfigError: there is no such preset.
    """
    if not isinstance(values, Mapping) or "preset" not in values:
        return values
    own = {name: value for name, value in values.items() if name != "preset"}
    return _written(values["preset"]) | own


def main(arguments: Sequence[str]) -> int:
    """Print the path of the preset that is named, or the names; the exit status."""
    try:
        print(preset_path(arguments[0]) if arguments else "\n".join(preset_paths()))
    except ConfigError as error:
        complain("sentencekv presets", str(error))
        return MISUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
