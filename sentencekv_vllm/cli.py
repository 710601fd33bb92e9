# SPDX-License-Identifier: Apache-2.0
"""The console script `sentencekv`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


def _eval(arguments: Sequence[str]) -> int:
    from .evaluation.command import main

    return main(arguments)


def _demo(arguments: Sequence[str]) -> int:
    from .demo import main

    return main(arguments)


def _presets(arguments: Sequence[str]) -> int:
    from .presets import main

    return main(arguments)


def _calibrate(arguments: Sequence[str]) -> int:
    from .calibrate import main

    return main(arguments)


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "eval": ("measure accuracy, distance from dense and traffic on the served path", _eval),
    "demo": ("serve needles in long texts with sentencekv and with stock attention", _demo),
    "calibrate": ("find the basis of a model's keys with a text of your own", _calibrate),
    "presets": ("list the presets, or print the path of one", _presets),
}
"""Each imports what it needs when it is called."""


def usage() -> str:
    """One line per command."""
    lines = [f"  {name:9} {text}" for name, (text, _) in COMMANDS.items()]
    return "usage: sentencekv COMMAND [--help]\n\n" + "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0
    if given[0] not in COMMANDS:
        print(f"sentencekv: no command {given[0]!r}\n{usage()}", file=sys.stderr)
        return 2
    _, command = COMMANDS[given[0]]
    return command(given[1:])


if __name__ == "__main__":
    sys.exit(main())
