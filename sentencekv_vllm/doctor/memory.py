# SPDX-License-Identifier: Apache-2.0
"""Where the swap pool and built kernels are kept."""

from __future__ import annotations

from .finding import Finding, State

PROBE_BYTES = 1 << 20


def memory(cuda: bool) -> list[Finding]:
    return [cache_folder(), host_memory(), pinned(cuda)]


def cache_folder() -> Finding:
    from ..ops.build_cache import VARIABLE, cache_dirs

    name, fix = "cache folder", f"set {VARIABLE} to a folder that this user can write to"
    try:
        folders = cache_dirs()
    except OSError as error:
        return Finding(name, State.BROKEN, str(error), fix)
    if len(folders) > 1:
        found = f"{folders[0]} cannot be written, {folders[-1]} is taken instead"
        return Finding(name, State.WARNING, found, fix)
    return Finding(name, State.OK, str(folders[0]))


def host_memory() -> Finding:
    from ..resolved import GIB
    from ..worker.host_memory import available_bytes

    free = available_bytes()
    if free is None:
        return Finding("host memory", State.UNKNOWN, "the system does not tell what is free")
    return Finding("host memory", State.OK, f"{free / GIB:.1f} GiB free for swap pools")


def pinned(cuda: bool) -> Finding:
    """Page-locked memory, as the swap pool is taken on a GPU."""
    name = "pinned memory"
    if not cuda:
        return Finding(name, State.UNUSED, "no CUDA device")
    import torch

    from ..config import ConfigError
    from ..worker.host_memory import HostPool

    try:
        HostPool((PROBE_BYTES,), torch.uint8, pinned=True).close()
    except ConfigError as error:
        message, _, fix = str(error).partition(": ")
        return Finding(name, State.BROKEN, message, fix)
    return Finding(name, State.OK, "the driver pins host memory")
