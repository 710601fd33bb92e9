# SPDX-License-Identifier: Apache-2.0
"""Entry point of `vllm.general_plugins`: vLLM calls it in every process."""

from __future__ import annotations


def register() -> None:
    """Make the backend known to vLLM. Calling it again changes nothing.

    Raises:
        RuntimeError: vLLM is missing.
    """
    try:
        import vllm  # noqa: F401  # only to explain its absence
    except ImportError as error:
        raise RuntimeError(
            "sentencekv_vllm is a plugin of vLLM, which cannot be imported "
            f"({error}). Install it with `pip install 'sentencekv-vllm[cuda]'` or `[cpu]`."
        ) from error
    from .vllm_glue.compat import install

    install()
