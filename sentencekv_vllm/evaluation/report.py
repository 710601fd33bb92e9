# SPDX-License-Identifier: Apache-2.0
"""Figures as files, and one HTML page that holds tables and figures and opens anywhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from .records import Record
from .table import Row

STYLE = """body { font: 14px system-ui, sans-serif; margin: 2rem; max-width: 90rem }
table { border-collapse: collapse; margin: 1rem 0; font-size: 12px }
td, th { border: 1px solid #ccc; padding: .2rem .5rem; text-align: left }
img { max-width: 100%; display: block; margin: 1rem 0 }"""


def write_report(
    folder: Path, rows: Sequence[Row], records: Sequence[Record], tables: str, title: str
) -> str:
    """Write `NAME.png` and `NAME.svg` of each figure, and `report.html`.

    Args:
        folder: where to.
        rows: of `table.summarise`.
        records: that they sum up.
        tables: the summary as Markdown.
        title: of the page; its settings in words.

    Returns:
        A line that says what was written, or how to get the figures.
    """
    try:
        from .plots import figures
    except ImportError:
        drawn: list[tuple[str, Any]] = []
        note = "without figures: pip install 'sentencekv-vllm[bench]' brings matplotlib"
    else:
        drawn = list(figures(rows, records))
        note = f"with {len(drawn)} figures"
    images = []
    for name, figure in drawn:
        figure.savefig(folder / f"{name}.svg")
        png = BytesIO()
        figure.savefig(png, format="png", dpi=150)
        (folder / f"{name}.png").write_bytes(png.getvalue())
        data = base64.b64encode(png.getvalue()).decode()
        images.append(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">')
    path = folder / "report.html"
    path.write_text(
        "<!doctype html>\n<html lang=en><meta charset=utf-8>"
        f"<title>sentencekv eval</title><style>{STYLE}</style>\n"
        f"<h1>sentencekv eval</h1>\n<p>{html.escape(title)}</p>\n"
        + "\n".join(images)
        + _html(tables)
        + "</html>\n"
    )
    return f"{path}, {note}"


def _html(markdown: str) -> str:
    """The two forms that our Markdown has: tables, and lines of text."""
    parts = []
    for block in markdown.split("\n\n"):
        lines = block.splitlines()
        if lines and lines[0].startswith("|"):
            head, _, *body = ([html.escape(c.strip()) for c in line.strip("|").split("|")]
                              for line in lines)  # fmt: skip
            parts.append(
                "<table><tr><th>" + "<th>".join(head)
                + "".join("<tr><td>" + "<td>".join(cells) for cells in body) + "</table>"
            )  # fmt: skip
        else:
            parts += [f"<p>{html.escape(line)}</p>" for line in lines]
    return "\n".join(parts)
