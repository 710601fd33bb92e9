# SPDX-License-Identifier: Apache-2.0
"""Print the integers by whose values Triton compiles a kernel anew, one kernel a line.

Run as `python -P tests/ops/triton_specialised.py` without TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
import pkgutil

from triton.runtime.jit import JITFunction

from sentencekv_vllm import triton_kernels


def main() -> None:
    for info in pkgutil.iter_modules(triton_kernels.__path__):
        module = importlib.import_module(f"{triton_kernels.__name__}.{info.name}")
        for name, kernel in vars(module).items():
            if isinstance(kernel, JITFunction) and kernel.__module__ == module.__name__:
                specialised = [
                    parameter.name
                    for parameter in kernel.params
                    if not parameter.is_constexpr and not parameter.do_not_specialize
                ]
                print(name, *specialised)


if __name__ == "__main__":
    main()
