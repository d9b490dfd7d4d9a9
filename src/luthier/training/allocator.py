"""The C library's allocator, told to keep what a training step frees: the next step wants the same sizes again."""

from __future__ import annotations

import ctypes
import sys

# <malloc.h> of glibc
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # what a 64-bit glibc accepts


def keep_freed_memory() -> bool:
    """Ask glibc to serve blocks up to 32 MB from its heap and never to shrink it; False on other systems.

    By default it maps large blocks anew each time, and the kernel clears every page of them: on two cores that took
    some 5% of a step (docs/performance.md). Memory at its peak is the same; between peaks it is not given back.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
