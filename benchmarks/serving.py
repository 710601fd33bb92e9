# SPDX-License-Identifier: Apache-2.0
"""Serving with stock attention and with sentencekv, side by side, under equal settings.

    python benchmarks/serving.py             # CPU: the small form; GPU: the shape of Llama-3.1-8B
    python benchmarks/serving.py --small     # four layers, minutes, on either

Both sides get a KV pool of the same number of bytes, which holds `--dense-requests` of the
longest requests. `serve` starts `vllm serve` and loads it with the client of `vllm bench serve`;
`offline` hands the same requests to `LLM.generate`. Random weights make timings, but no
realistic selection: their hit rates mean nothing. So the embedded tiny-recall model is served,
too, and asked needle questions under load (`--no-answers` leaves that out).
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from serving_client import SHORT, load, reply
from serving_engine import SIDES, Case, engine_options, serve_arguments
from serving_model import Model, Prompt
from serving_offline import measure
from serving_options import ANSWERS, fitting, load_name, parse, setup
from serving_report import provenance, table, write
from serving_row import Row, make_row
from serving_watch import Watch

from sentencekv_vllm.evaluation.server import Server, ServerError

READY_SECONDS = 900


def serve(options: argparse.Namespace, model: Model, loads: list[Case], logs: Path) -> list[Row]:
    """Every load on both servers: in turns, or one server after the other.

    Raises:
        ServerError: a server did not start.
    """
    rows = []
    for sides in [SIDES] if options.together else [[side] for side in SIDES]:
        with ExitStack() as stack:
            servers = {}
            for side in sides:
                arguments = serve_arguments(engine_options(model, setup(options), loads, side))
                server = Server(model.folder, arguments, logs / f"{side}.log")
                servers[side] = stack.enter_context(server)
            for server in servers.values():
                server.wait_ready(READY_SECONDS)
            for number, case in enumerate(loads * options.rounds):
                for side, server in servers.items():
                    announce("serve", side, case)
                    rows.append(serve_one(server, side, model, case, number))
    return rows


def announce(mode: str, side: str, case: Case) -> None:
    print(f"{mode} {side}: {load_name(case)}", file=sys.stderr, flush=True)


def serve_one(server: Server, side: str, model: Model, case: Case, number: int) -> Row:
    """One load on one server; no prompt of it was seen before."""
    first = 1000 * number
    *prompts, warm = (model.prompt(case.context, first + i) for i in range(case.requests + 1))
    few = Prompt(warm.ids[:SHORT])
    for prompt in (warm, few):
        reply(server.url, model, prompt)
    with Watch(server.metrics_text, server.pid) as watch:
        result = load(server.url, model, prompts, case)
        reply(server.url, model, few)
    for error in filter(None, result["errors"]):
        print(f"{side}: {error}", file=sys.stderr)
        break
    return make_row("serve", side, model, case, prompts, result, watch)


def offline(options: argparse.Namespace, loads: list[Case], logs: Path) -> list[Row]:
    """The largest load of every context, one engine after the other."""
    largest = {case.context: case for case in loads}
    rows = []
    for case in [*largest.values()] * options.rounds:
        for side in SIDES:
            announce("offline", side, case)
            log = logs / f"offline-{side}.log"
            rows.append(measure(options.model, setup(options), case, side, log))
    return rows


def run(options: argparse.Namespace) -> list[Row]:
    """One form, all modes."""
    with tempfile.TemporaryDirectory() as folder:
        model = Model(options.model, Path(folder))
        loads = fitting(options, model)
        rows = serve(options, model, loads, Path(folder)) if "serve" in options.modes else []
        if "offline" in options.modes:
            rows += offline(options, loads, Path(folder))
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    options = parse((__doc__ or "").partition("\n")[0], arguments)
    # Without a handler a terminated benchmark would leave its servers behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    forms = [options]
    if options.answers:
        forms.append(argparse.Namespace(**vars(options) | ANSWERS))
    source = provenance()  # of what runs now, whatever the checkout is by the end
    rows: list[Row] = []
    try:
        for form in forms:
            rows += run(form)
    except (ServerError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(", ".join(f"{name} {value}" for name, value in source.items()), end="\n\n")
    print(table(rows))
    write(options.out, rows, source)
    print(f"\n{len(rows)} rows in {options.out}.json and .csv")
    return 1 if any(row.failed for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
