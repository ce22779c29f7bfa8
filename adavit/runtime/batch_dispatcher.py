"""Batches on a device: a block of all images is one run, whatever each of them keeps.

Decisions are made on the device. The host fetches how much room each block takes, for the whole batch at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

import numpy as np
import numpy.typing as npt

from adavit.architecture import TOKEN_LOGIT, Architecture
from adavit.bundle.operating_points import Offsets
from adavit.bundle.policy import Policy
from adavit.runtime.batch import Finished, Lane, rooms_of
from adavit.runtime.finite import check_logits, not_finite

__all__ = ["BatchDispatcher", "limits_of"]

Float = npt.NDArray[np.float32]
