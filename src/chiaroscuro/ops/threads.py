"""Work shared out among Python threads: for scipy, whose transforms let go of the interpreter's lock.

Threads of scipy's own would each get an equal part, before it is known how fast they are. And they are not equally
fast: for milliseconds after an operation PyTorch's threads stay on their cores and spin, waiting for the next, and a
thread that comes meanwhile has half a core. So here each takes another part when it has done one.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch


def share_out(work: Callable[[slice], None], parts: Iterable[slice]) -> None:
    """Do `work` for each part, on as many threads as PyTorch uses, of which the caller's is one.

    The parts are handed out in their order and end in any. The caller doesn't wait for a thread that has yet to begin.

    Raises:
        Exception: what `work` raises; of the other parts some may then have been done.

    """
    remaining = deque(parts)

    def take_part_after_part() -> None:
        while True:
            try:
                part = remaining.popleft()
            except IndexError:
                return
            work(part)

    helpers = min(torch.get_num_threads(), len(remaining)) - 1
    asked = [_pool().submit(take_part_after_part) for _ in range(helpers)]
    try:
        take_part_after_part()
    finally:
        remaining.clear()  # an error ends the others' work too
        for helper in asked:
            if not helper.cancel():
                helper.result()


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    """Threads that sleep between tasks, each started when it is first of use."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="chiaroscuro")


# A forked process, such as a worker that loads data, has the pool but none of its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
