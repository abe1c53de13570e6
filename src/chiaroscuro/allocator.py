"""One setting of the C library's allocator, which much of a layer's time on a CPU can hang on."""

import ctypes
import sys

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

LARGEST = 2**26
"""Bytes of the largest block that is kept.

A larger one, such as the logits of a long row, gets new pages each time, which can take as long as simple arithmetic on
it. But kept, its place would be broken up by the first small block that outlives it, and the next one needs another
place: a fit of a model of 135M parameters on rows of 2048 tokens grew until the machine was full. Work that is to be
fast takes smaller blocks, as `gains_of_pairs` does.
"""


def keep_freed_memory() -> None:
    """Keep the memory that tensors give back, for the next ones, instead of returning it to the system each time.

    A tensor of some megabytes comes from the system, page by page and zeroed, and goes back to it, at every operation.
    Kept, it is there already; `benchmarks/choices.py` measures what that spares a routed layer. The process then stays
    as large as it once was. Without effect where the C library is not glibc.

    It is for programs of one's own, as this package's command line is: a library has no business to set it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
