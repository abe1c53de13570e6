"""Python's work on PyTorch's own threads: for scipy, whose transforms let go of the interpreter's lock.

PyTorch's operations run on OpenMP's threads, and these stay on their cores for milliseconds after an operation,
spinning, so that the next one finds them awake. Threads of another kind, scipy's or Python's, would share the cores
with them meanwhile, and be done hardly sooner than one alone. So OpenMP's own are called, by the function that GCC
makes of `#pragma omp parallel` and that LLVM's and Intel's runtimes offer too.
"""

import ctypes
from collections import deque
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch

REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
"""What OpenMP calls once on each thread: `void region(void *data)`."""


def can_share_out() -> bool:
    """Whether `share_out` reaches all the threads that PyTorch uses: where these are OpenMP's, or but one."""
    return torch.get_num_threads() == 1 or _parallel() is not None


def share_out(work: Callable[[slice], object], parts: Iterable[slice]) -> None:
    """Do `work` for each part, on as many threads as PyTorch uses, of which the caller's is one.

    A thread that has done a part takes the next, so the parts begin in their order and end in any. Where
    `can_share_out` says no, the caller's thread does it all.

    Args:
        work: of one part. It should let go of the interpreter's lock for most of its time, or the threads only queue.
        parts: each is done once.

    Raises:
        BaseException: what `work` raised first; of the other parts some may have been done.
        KeyboardInterrupt: Control-C came where it could stop the work and not be raised.

    """
    remaining = deque(parts)
    number = len(remaining)
    done: list[slice] = []
    errors: list[BaseException] = []

    def take_part_after_part(_: Any = None) -> None:
        # An error, Control-C's too, can't cross OpenMP: it ends the work of all and is raised afterwards.
        try:
            while True:
                try:
                    part = remaining.popleft()
                except IndexError:
                    return
                work(part)
                done.append(part)
        except BaseException as error:
            errors.append(error)
            remaining.clear()

    threads = min(torch.get_num_threads(), number)
    parallel = _parallel() if threads > 1 else None
    if parallel is None:
        take_part_after_part()
    else:
        parallel(REGION(take_part_after_part), None, threads, 0)
    if errors:
        raise errors[0]
    if len(done) < number:
        # A signal that comes between OpenMP and the `try` above is dropped by ctypes, and with it a thread's work.
        raise KeyboardInterrupt


@lru_cache(maxsize=1)
def _parallel() -> Callable[..., None] | None:
    """`void GOMP_parallel(void (*region)(void *), void *data, unsigned threads, unsigned flags)`, where it is.

    Source: GNU libgomp, "The libgomp ABI".
    """
    if not torch.backends.openmp.is_available():
        return None
    try:
        # The one that PyTorch uses: `import torch` loads it with RTLD_GLOBAL. Where it doesn't, there is none to find.
        function: Any = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes, function.restype = [REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return function
