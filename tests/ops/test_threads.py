"""Shared work is done once each, by as many threads as PyTorch has, in a forked process too, and errors come out."""

import os
import threading
import time
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chiaroscuro.ops.threads import share_out


@given(parts=st.integers(0, 50), threads=st.integers(1, 5))
def test_each_part_is_done_once(parts: int, threads: int) -> None:
    done: list[slice] = []
    wanted = [slice(n, n + 1) for n in range(parts)]
    with mock.patch.object(torch, "get_num_threads", return_value=threads):
        share_out(done.append, iter(wanted))
    assert sorted(done, key=lambda part: part.start) == wanted


@pytest.mark.parametrize("threads", [1, 2])
def test_pytorchs_number_of_threads_take_part(threads: int) -> None:
    seen = set()

    def work(part: slice) -> None:
        seen.add(threading.get_ident())
        time.sleep(0.01)

    with mock.patch.object(torch, "get_num_threads", return_value=threads):
        share_out(work, (slice(n, n + 1) for n in range(20)))
    assert len(seen) == threads and threading.get_ident() in seen


@pytest.mark.parametrize("by_the_caller", [True, False])
def test_an_error_comes_out_and_ends_the_work(by_the_caller: bool) -> None:
    caller, failed, done = threading.get_ident(), threading.Event(), []

    def work(part: slice) -> None:
        if (threading.get_ident() == caller) == by_the_caller:
            failed.set()
            raise RuntimeError("a part that can't be done")
        failed.wait(10)
        time.sleep(0.01)
        done.append(part)

    with mock.patch.object(torch, "get_num_threads", return_value=2), pytest.raises(RuntimeError, match="can't be"):
        share_out(work, (slice(n, n + 1) for n in range(1000)))
    if by_the_caller:
        assert len(done) <= 2, "the other thread should have stopped"


def test_a_thread_that_has_not_begun_is_not_waited_for() -> None:
    """All the pool's threads are busy with others' work: the caller does its own alone."""
    free = threading.Event()
    with mock.patch.object(torch, "get_num_threads", return_value=2 * (os.cpu_count() or 1) + 1):
        others = threading.Thread(
            target=share_out,
            args=(lambda part: free.wait(30), [slice(n, n + 1) for n in range(2 * (os.cpu_count() or 1) + 1)]),
        )
        others.start()
        time.sleep(0.05)
        done: list[slice] = []
        share_out(done.append, [slice(n, n + 1) for n in range(10)])
    waiting = others.is_alive()
    free.set()
    others.join()
    assert len(done) == 10 and waiting


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_threads_of_its_own() -> None:
    def work(part: slice) -> None:
        seen.add(threading.get_ident())
        time.sleep(0.01)

    with mock.patch.object(torch, "get_num_threads", return_value=2):
        seen: set[int] = set()
        share_out(work, [slice(n, n + 1) for n in range(10)])
        child = os.fork()
        if child == 0:
            seen.clear()
            share_out(work, [slice(n, n + 1) for n in range(10)])
            os._exit(len(seen))
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 2
