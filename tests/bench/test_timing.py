"""Throughput and latency from calls, and the bounds of a closed loop."""

import asyncio
import subprocess
import sys

import pytest

from scaphoid.bench.server_load import WARM_UP, LoadError, StageTotals, closed_loop
from scaphoid.bench.timing import Rate, batches, measure, session_cpu_s, together
from scaphoid.triton_repo.client import RequestFailed, RequestRejected, ServerUnavailable

IMAGES = [b"a", b"b", b"c"]


def test_a_rate_has_images_a_second_and_percentiles():
    rate = Rate(30, 4.0, tuple(float(ms) for ms in range(1, 102)))
    assert rate.images_per_s == 7.5
    assert [rate.percentile_ms(percent) for percent in (50, 95, 99)] == [51.0, 96.0, 100.0]


def test_rates_together_weigh_by_time_not_by_span():
    both = together([Rate(10, 1.0, (1.0, 2.0)), Rate(10, 4.0, (9.0,))])
    assert both.images_per_s == 4.0
    assert both.latencies_ms == (1.0, 2.0, 9.0)


def test_batches_go_round_and_round():
    source = batches(IMAGES, 2)
    assert [next(source) for _ in range(3)] == [[b"a", b"b"], [b"c", b"a"], [b"b", b"c"]]


def test_measuring_leaves_out_the_warm_up_and_counts_at_least_two_calls():
    seen = []
    rate = measure(seen.append, IMAGES, 2, seconds=0)
    assert len(seen) == 3
    assert rate.images == 4
    assert len(rate.latencies_ms) == 2
    assert rate.seconds >= sum(rate.latencies_ms) / 1e3
    assert rate.cpu_s >= 0


def test_cpu_time_is_of_a_whole_session():
    work = "os.fork() or sum(i * i for i in range(10**7)); print(flush=True); sys.stdin.read()"  # the child works
    command = [sys.executable, "-S", "-c", f"import os, sys; {work}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert [process.stdout.readline(), process.stdout.readline()] == [b"\n"] * 2
        both = session_cpu_s(process.pid)
        process.stdin.close()
    assert both > 0.08


class Clients:
    """Clients that answer after a moment; `behave` is called with the number of requests sent so far."""

    def __init__(self, count, behave=lambda number: None):
        self.sent, self.in_flight, self.most_in_flight, self.behave = [], 0, 0, behave
        self.predicts = [self.predict] * count

    async def predict(self, image):
        self.sent.append(image)
        number = len(self.sent)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(0.002)
        self.in_flight -= 1
        self.behave(number)


def test_a_closed_loop_counts_the_requests_asked_for_with_every_client_busy():
    clients = Clients(3)
    load = asyncio.run(closed_loop(clients.predicts, IMAGES, requests=20, seconds=60))
    assert load.rate.images == len(load.rate.latencies_ms) == 20
    assert clients.most_in_flight == 3
    assert 20 + 3 * WARM_UP <= len(clients.sent) <= 20 + 3 * WARM_UP + 3  # what is in flight at the end is not counted
    assert set(clients.sent) == set(IMAGES)
    assert load.failures == ()


def test_a_closed_loop_ends_in_time():
    load = asyncio.run(closed_loop(Clients(2).predicts, IMAGES, requests=10**9, seconds=0.1))
    assert 0 < load.rate.images < 10**6
    assert load.rate.seconds <= 0.2


def test_failed_requests_are_told_and_not_counted():
    def behave(number):
        if number % 4 == 0:
            raise (RequestFailed if number % 8 else RequestRejected)(f"request {number}")

    load = asyncio.run(closed_loop(Clients(2, behave).predicts, IMAGES, requests=40, seconds=60))
    assert load.rate.images + len(load.failures) == 40
    assert len(load.failures) >= 10
    assert load.failures[0] == "request 4"


def test_a_load_in_which_everything_fails_says_why():
    def behave(number):
        raise RequestFailed("the queue is full")

    with pytest.raises(LoadError, match=r"2 clients.*the queue is full"):
        asyncio.run(closed_loop(Clients(2, behave).predicts, IMAGES, requests=10, seconds=60))


def test_a_server_that_goes_away_ends_the_load():
    def behave(number):
        if number == 9:
            raise ServerUnavailable("went away")

    with pytest.raises(ServerUnavailable):
        asyncio.run(closed_loop(Clients(2, behave).predicts, IMAGES, requests=1000, seconds=60))


def test_server_statistics_are_differences():
    before, after = StageTotals(3, 2, 3, 0.5, 1.0), StageTotals(10, 4, 10, 1.5, 4.0)
    assert after.since(before) == StageTotals(7, 2, 7, 1.0, 3.0)
    assert after.since(before) + before == after
