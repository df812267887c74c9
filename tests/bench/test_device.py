"""bench/device.py: what its seconds count, on a device that is not there."""

import pytest
import torch

from bench import device


class Pretended:
    """A host and a device that takes its work in turn; seconds of both are made up."""

    CYCLE, RECORD = 5e-10, 1e-6  # of the device; what an event takes the host

    def __init__(self):
        self.host = self.free = 0.0
        self.waits = []

    def work(self, seconds, launch=10e-6):
        """A launch, which the host is busy with, and what the device then has to do."""
        self.host += launch
        self.free = max(self.free, self.host) + seconds

    def wait(self, cycles):
        self.waits.append(cycles)
        self.work(cycles * self.CYCLE)

    def until(self, seconds):
        self.host = max(self.host, seconds)

    def event(self, enable_timing):
        return Event(self)


class Event:
    def __init__(self, on):
        self.on = on

    def record(self):
        self.on.work(0.0, self.on.RECORD)
        self.at = self.on.free

    def query(self):
        return self.at <= self.on.host

    def synchronize(self):
        self.on.until(self.at)

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


@pytest.fixture
def gpu(monkeypatch):
    gpu = Pretended()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: gpu.until(gpu.free))
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.wait)
    return gpu


def test_a_launch_counts_where_the_host_is_not_ahead(gpu):
    runs = {"copy": lambda: gpu.work(250e-6), "small": lambda: gpu.work(2e-6)}
    found = device.medians(runs, 3, "cuda")
    assert not gpu.waits
    assert found == pytest.approx({"copy": 260e-6, "small": 12e-6})
    found = device.medians(runs, 3, "cuda", ahead=True)
    assert found == pytest.approx({"copy": 250e-6, "small": 2e-6})
    assert set(gpu.waits) == {device.AHEAD}


def test_what_takes_the_host_long_is_waited_for_longer(gpu):
    """A graph of many kernels."""
    found = device.medians({"graph": lambda: gpu.work(1e-3, launch=4e-3)}, 1, "cuda", ahead=True)
    assert found == pytest.approx({"graph": 1e-3})
    assert gpu.waits == [device.AHEAD, 10 * device.AHEAD, 100 * device.AHEAD] * 2


def test_what_waits_for_the_device_is_measured_all_the_same(gpu):
    def run():
        gpu.work(1e-3)
        gpu.until(gpu.free)

    assert device.medians({"run": run}, 1, "cuda", ahead=True)["run"] > 1e-3
    assert max(gpu.waits) == device.MOST


def test_on_the_cpu_it_is_the_clock(gpu):
    found = device.medians({"nothing": lambda: None}, 2, "cpu", ahead=True)
    assert found["nothing"] >= 0 and not gpu.waits and gpu.host == 0
