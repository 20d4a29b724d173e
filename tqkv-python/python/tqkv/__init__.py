"""A KV cache that stays compressed (TurboQuant), and attention straight over the compressed bytes.

Arrays are numpy's, torch's, or anything with ``__dlpack__``; on their own device they are used where they lie, without copies.
``tqkv.transformers`` is a cache for transformers, ``tqkv.vllm`` a plugin for vLLM.
"""

from ._native import *  # noqa: F403
from ._native import Step, __version__
from .calibration import Calibration, CalibrationError


def _append_and_attend(self, layer, k, v, q, **kwargs):
    """``append`` and ``attend`` of a layer that holds positions of its own."""
    self.append(layer, k, v)
    return self.attend(layer, q, **kwargs)


Step.append_and_attend = _append_and_attend
del _append_and_attend
