# SPDX-License-Identifier: Apache-2.0
"""Real, pretrained models, and questions about real text and real code in their chat template."""
