# SPDX-License-Identifier: Apache-2.0
"""`python -P -m sentencekv_vllm.vllm_glue.contract VLLM [--as 0.32]`; `make guard` calls it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import BODIES, NAMES
from .check import column, differences, unread
from .name import VERSIONS
from .source import Sources

ADVICE = """\
A name that differs: mend the file of ours, then put the new signature into the table in
sentencekv_vllm/vllm_glue/contract/. A body that differs: read it; if what we rely on still holds,
put its digest into bodies.py. Then add the version to setup.TESTED and run the tests with it."""


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: nothing differs."""
    parser = argparse.ArgumentParser(
        prog="make guard", description="Compare a vLLM with what our glue leans on; reads sources."
    )
    parser.add_argument("vllm", type=Path, help="a wheel, an unpacked wheel, or the folder vllm")
    parser.add_argument(
        "--as", dest="version", choices=VERSIONS, help="compare with this version's column"
    )
    chosen = parser.parse_args(arguments)
    try:
        sources = Sources(chosen.vllm)
    except ValueError as error:
        parser.error(str(error))
    found = sources.version()
    version = chosen.version or column(found)
    wrong, changed = differences(sources, version), unread(sources, version)
    print(
        f"vLLM {found or 'of unknown version'} against what was read of {version}: "
        f"{len(NAMES)} names, {len(wrong)} differ; {len(BODIES)} bodies, {len(changed)} differ"
    )
    if not wrong and not changed:
        return 0
    print("\n".join([*wrong, *changed]))
    print(ADVICE)
    return 1


if __name__ == "__main__":
    sys.exit(main())
