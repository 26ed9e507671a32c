"""Jobs are shared among threads, and nobody sees how."""

from __future__ import annotations

import threading

import pytest
import torch

from cmd_plugin.kernels._threads import in_threads, shares

LARGE = 1 << 20


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_are_in_the_order_of_the_jobs(threads: int) -> None:
    torch.set_num_threads(threads)
    assert in_threads(lambda job: job * job, range(17), LARGE) == [n * n for n in range(17)]
    assert in_threads(lambda job: job, [], LARGE) == []


def test_two_threads_work_at_once_and_the_caller_is_one_of_them() -> None:
    torch.set_num_threads(2)
    both = threading.Barrier(2, timeout=10)

    def work(_: int) -> int:
        both.wait()  # returns when two are here
        return threading.get_ident()

    assert threading.get_ident() in in_threads(work, [0, 1], LARGE)


@pytest.mark.parametrize("bad", [0, 5])
def test_an_error_of_a_job_is_raised(bad: int) -> None:
    torch.set_num_threads(2)

    def work(job: int) -> int:
        if job == bad:
            raise ValueError(f"job {job}")
        return job

    with pytest.raises(ValueError, match=f"job {bad}"):
        in_threads(work, range(6), LARGE)


def test_shares_do_not_depend_on_the_threads() -> None:
    parts = shares(LARGE + 3)
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert (parts[0].start, parts[-1].stop) == (0, LARGE + 3)
