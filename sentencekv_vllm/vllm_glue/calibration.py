# SPDX-License-Identifier: Apache-2.0
"""Bases of this model's keys: from the file of an earlier start, or from forwards of a text.

All tensor-parallel ranks run the forwards together, each for its own heads, or none does: they
agree before it and on the outcome.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group

from ..config import ConfigError
from ..ops.basis import Axes, coded_basis
from ..ops.basis_file import BasisFile, BasisFileError, basis_path, load_basis, save_basis
from ..resolved import ResolvedConfig
from ..types import Basis, Geometry
from .calibration_run import measure, prepare
from .calibration_text import CalibrationError, Job, is_forced, read_job
from .identity import identity
from .model_runner import current_model

logger = logging.getLogger(__name__)


def find_bases(
    vllm_config: Any,
    resolved: ResolvedConfig,
    geometry: Geometry,
    layer_names: Sequence[str],
    device: torch.device,
) -> list[Basis] | None:
    """A basis for each layer; None: the fixed one for all, for a reason that is logged.

    Raises:
        ConfigError: the user asked for a calibration, and it cannot run.
    """
    try:
        if not geometry.code_width:
            raise CalibrationError("no policy of this server ranks by them", is_chosen=True)
        if not resolved.config.calibration:
            raise CalibrationError("the setting calibration is false", is_chosen=True)
        layers = _axes(vllm_config, geometry, layer_names, device)
    except CalibrationError as error:
        if is_forced(vllm_config.additional_config):
            raise ConfigError(f"the model cannot be calibrated: {error}") from error
        level = logging.INFO if error.is_chosen else logging.WARNING
        logger.log(level, "SentenceKV: no basis is calibrated for codes of keys: %s", error)
        return None
    bits = resolved.config.index_bits
    return [coded_basis(axes, resolved.code_channels, bits, device) for axes in layers]


def _axes(
    vllm_config: Any, geometry: Geometry, layer_names: Sequence[str], device: torch.device
) -> tuple[Axes, ...]:
    """Those of the file, or new ones.

    Raises:
        CalibrationError: there is no file, and the forwards cannot run or have failed.
    """
    model, job = current_model(), read_job(vllm_config.additional_config)
    if model is None:  # on all ranks alike
        raise CalibrationError("vLLM's model runner gave its model to nobody")
    name, path = _name(vllm_config, geometry, model)
    stored = None if path is None or job.is_forced else _stored(path, name, geometry, job)
    if not _on_any_rank(stored is None):
        assert stored is not None
        logger.info("SentenceKV: keys are coded in the basis of %s", path)
        return stored.layers
    started = time.perf_counter()
    runs, failure = [], ""
    try:
        runs = prepare(vllm_config, job, geometry.block_size)
    except CalibrationError as error:
        failure = str(error)
    if _on_any_rank(bool(failure)):
        raise CalibrationError(failure or "another rank cannot run the forwards")
    found: BasisFile | None = None
    try:
        moments = measure(vllm_config, model, runs, layer_names, geometry.block_size, device)
        layers = tuple(_as_stored(m.axes()) for m in moments)
        found = BasisFile(name, job.source, moments[0].tokens, layers)
    except Exception as error:  # whatever a model raises, the server can start without
        failure = f"a forward of the text failed ({type(error).__name__}: {error})"
    if _on_any_rank(found is None) or found is None:
        raise CalibrationError(failure or "a forward of the text failed on another rank")
    tokens, seconds = sum(len(run.ids) for run in runs), time.perf_counter() - started
    kept = path if path is not None and _save(path, found) else "not kept"
    logger.info("SentenceKV: calibrated with %d tokens in %.1f s (%s)", tokens, seconds, kept)
    return found.layers


def _name(vllm_config: Any, geometry: Geometry, model: Any) -> tuple[str, Path | None]:
    """What the axes are of, and their file; None where none can be kept."""
    group = get_tp_group()
    ranks = (group.rank_in_group, group.world_size)
    name = ""
    try:
        name = identity(model, vllm_config.model_config, geometry, *ranks)
        return name, basis_path(name)
    except (OSError, RuntimeError) as error:  # files, tensors of an unknown kind, no folder
        logger.warning("SentenceKV: a calibration cannot be kept: %s", error)
        return name, None


def _stored(path: Path, name: str, geometry: Geometry, job: Job) -> BasisFile | None:
    """What the file holds, unless it is of no use."""
    heads = [geometry.num_kv_heads] * geometry.num_layers
    try:
        found = load_basis(path, name, heads, geometry.head_dim)
    except FileNotFoundError:
        return None
    except BasisFileError as error:
        logger.warning("SentenceKV: %s is of no use and made anew: %s", path, error)
        return None
    # What the user calibrated with stays, whatever text is bundled by now.
    return found if found.is_users or found.source == job.source else None


def _save(path: Path, found: BasisFile) -> bool:
    try:
        save_basis(path, found)
    except OSError as error:
        logger.warning("SentenceKV: the next start calibrates again: cannot write %s", error)
        return False
    return True


def _as_stored(axes: Axes) -> Axes:
    """Rounded as in a file: a start that reads it has the same basis."""
    parts = (axes.keys.float(), axes.queries.float(), axes.mean.float())
    return replace(axes, keys=parts[0], queries=parts[1], mean=parts[2])


def _on_any_rank(flag: bool) -> bool:
    """Whether it is set on any rank of tensor parallelism; all ask together."""
    group = get_tp_group()
    if group.world_size == 1:
        return flag
    told = torch.tensor([flag], dtype=torch.int32)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, group.cpu_group)
    return bool(told)
