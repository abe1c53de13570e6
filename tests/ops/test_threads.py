"""Shared work is done once each, by as many threads as PyTorch has, and errors come out."""

import ctypes
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from chiaroscuro.ops import dct, threads
from chiaroscuro.ops.threads import can_share_out, share_out


def parts(number: int) -> list[slice]:
    return [slice(n, n + 1) for n in range(number)]


needs_openmp = pytest.mark.skipif(threads._parallel() is None, reason="PyTorch's threads aren't OpenMP's here")


@given(number=st.integers(0, 50), of_pytorch=st.integers(1, 5))
def test_each_part_is_done_once(number: int, of_pytorch: int) -> None:
    done: list[slice] = []
    with mock.patch.object(torch, "get_num_threads", return_value=of_pytorch):
        share_out(done.append, iter(parts(number)))
    assert sorted(done, key=lambda part: part.start) == parts(number)


@needs_openmp
@pytest.mark.parametrize("of_pytorch", [1, 2])
def test_pytorchs_number_of_threads_take_part(of_pytorch: int) -> None:
    seen = set()

    def work(part: slice) -> None:
        seen.add(threading.get_ident())
        time.sleep(0.01)

    with mock.patch.object(torch, "get_num_threads", return_value=of_pytorch):
        share_out(work, parts(20))
    assert len(seen) == of_pytorch and threading.get_ident() in seen


@needs_openmp
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("by_the_caller", [True, False])
def test_an_error_comes_out_and_ends_the_work(by_the_caller: bool, error: type[BaseException]) -> None:
    caller, failed, done = threading.get_ident(), threading.Event(), []

    def work(part: slice) -> None:
        if (threading.get_ident() == caller) == by_the_caller:
            failed.set()
            raise error("a part that can't be done")
        failed.wait(10)
        time.sleep(0.01)
        done.append(part)

    with mock.patch.object(torch, "get_num_threads", return_value=2), pytest.raises(error, match="can't be done"):
        share_out(work, parts(1000))
    assert len(done) <= 2, "the other thread should have stopped"


def test_without_openmp_the_caller_does_it_all() -> None:
    threads._parallel.cache_clear()
    try:
        with (
            mock.patch.object(torch, "get_num_threads", return_value=2),
            mock.patch.object(ctypes, "CDLL", side_effect=OSError),
        ):
            seen = set()
            share_out(lambda part: seen.add(threading.get_ident()), parts(20))
            assert seen == {threading.get_ident()} and not can_share_out()
        with mock.patch.object(torch, "get_num_threads", return_value=1):
            assert can_share_out()
    finally:
        threads._parallel.cache_clear()


def test_work_that_was_dropped_is_not_taken_for_done() -> None:
    """So ends a Control-C that ctypes swallows: the region returns and has done nothing."""
    with (
        mock.patch.object(torch, "get_num_threads", return_value=2),
        mock.patch.object(threads, "_parallel", return_value=lambda region, data, number, flags: None),
        pytest.raises(KeyboardInterrupt),
    ):
        share_out(lambda part: None, parts(3))


@needs_openmp
def test_several_threads_of_python_share_out_at_once() -> None:
    x = torch.randn(4000, 70, generator=torch.Generator().manual_seed(0))
    expected = dct(x)
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: dct(x), range(40)):
            torch.testing.assert_close(y, expected)


class Transformed(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, number: int) -> torch.Tensor:
        return dct(torch.full((4000, 70), float(number)))


def test_a_worker_that_loads_data_can_transform() -> None:
    """A DataLoader gives its workers one thread. (In any other fork with more, PyTorch's own operations hang too.)"""
    expected = Transformed()[2]
    *_, last = DataLoader(Transformed(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
    torch.testing.assert_close(last, expected)
