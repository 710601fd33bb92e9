# SPDX-License-Identifier: Apache-2.0
"""`python -P -m sentencekv_vllm.cli`, where the console script is not on the PATH."""

from __future__ import annotations

import sys

from .main import main

sys.exit(main())
