# SPDX-License-Identifier: Apache-2.0
"""Token ids of a prompt in, ends of its sentences out. No torch, no vLLM."""

from .lengths import SentenceLengths
from .service import SEGMENTERS, SegmentationService
from .vocabulary import Vocabulary

__all__ = ["SEGMENTERS", "SegmentationService", "SentenceLengths", "Vocabulary"]
