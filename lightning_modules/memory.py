"""How a process keeps the memory of its tensors on a CPU."""

import ctypes
import sys

# malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX.
SETTINGS = ((-1, 2**31 - 1), (-2, 2**28), (-4, 0), (-8, 1))


def keep_freed() -> None:
    """Let this process keep the memory that it frees, for its next tensors.

    By default glibc returns large blocks to the system, which clears them anew for every tensor: a
    seventh of the time of a training step of the proxy, half of a pass over a whole volume. This
    has an effect on Linux with glibc only.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # glibc's
            for parameter, value in SETTINGS:
                mallopt(parameter, value)
