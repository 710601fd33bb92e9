# SPDX-License-Identifier: Apache-2.0
"""A digest of what calibrated axes depend on: the weights on this rank and how keys are cut up."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..types import Geometry

METHOD = 2  # counts up when equal weights would get other axes
SAMPLE = 1024  # elements of a tensor that are looked at
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def identity(model: nn.Module, model_config: Any, geometry: Geometry, rank: int, ranks: int) -> str:
    """Hexadecimal; equal for equal weights, wherever their files are.

    Args:
        geometry: of this rank.
        rank, ranks: of tensor parallelism.
    """
    digest = hashlib.sha256()
    shape = (geometry.num_layers, geometry.num_kv_heads, geometry.group_size, geometry.head_dim)
    facts = (METHOD, str(model_config.dtype), geometry.block_size, shape, rank, ranks)
    digest.update(repr(facts).encode())
    samples, is_whole = [], True
    for name, tensor in sorted(_tensors(model), key=lambda named: named[0]):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        is_whole &= tensor.numel() > 0
        if tensor.numel():
            samples.append(_sample(tensor).cpu())
    if samples:
        digest.update(torch.cat(samples).numpy().tobytes())
    if not is_whole:  # the CPU keeps linear layers packed, out of sight
        for path in _weight_files(model_config):
            digest.update(_file_sample(path))
    return digest.hexdigest()


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters, by the names that they have without LoRA, and the tables of RoPE. Experts are
    left out: which of them are on a rank depends on more than tensor parallelism."""
    found = [
        (name.replace(".base_layer", ""), p.data)
        for name, p in model.named_parameters()
        if ".experts." not in name
    ]
    tables = [named for named in model.named_buffers() if named[0].endswith("cos_sin_cache")]
    return found + tables


def _sample(tensor: Tensor) -> Tensor:
    """Bytes of elements at equal distances, as they lie in memory."""
    count = tensor.numel()
    if torch.ops.aten.is_non_overlapping_and_dense(tensor):
        flat = tensor.as_strided((count,), (1,))
    else:
        flat = tensor.reshape(-1)
    return flat[:: max(1, count // SAMPLE)].contiguous().view(torch.uint8)


def _weight_files(model_config: Any) -> list[Path]:
    folder = Path(model_config.model)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        try:
            found = try_to_load_from_cache(
                model_config.model, "config.json", revision=model_config.revision
            )
        except ValueError:  # no name of a repository: a file, or another kind of address
            found = None
        if not isinstance(found, str):
            return [folder] if folder.is_file() else []
        folder = Path(found).parent
    return sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS)


def _file_sample(path: Path) -> bytes:
    size = path.stat().st_size
    parts = [str(size).encode()]
    with path.open("rb") as file:
        for i in range(64):
            file.seek(size * i // 64)
            parts.append(file.read(256))
    return b"".join(parts)
