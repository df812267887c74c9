"""glibc's malloc keeps what a step frees, and only while the run lasts."""

import os
import platform
import subprocess
import sys

import pytest

from mokd_fast.train import malloc
from mokd_fast.train.loop import Trainer, pretrain
from tests.train.recipes import VIT, pictures, silent, small

NONE = dict.fromkeys(("self", "cross", "search"), "0it")
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")

FAULTS = """
import resource, torch
from mokd_fast.train.malloc import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)  # 64 MiB: 16384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

torch.set_num_threads(1)
found = [faults(), faults()]
with freed_memory_kept():
    found += [faults(), min(faults() for _ in range(12))]  # the heap grows first
    before = resident()
found += [before - resident(), faults()]
print(*found)
"""


def run(code: str = FAULTS, **env: str) -> list[int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=clean | env, capture_output=True, text=True, check=True)
    return [int(word) for word in found.stdout.split()]


@glibc
def test_page_faults():
    *default, first, kept, freed, after = run()
    assert min(*default, first, after) > 16000  # every page is cleared anew
    assert kept < 100
    assert freed > 15000  # pages that go back when the run is over


@glibc
def test_what_the_user_chose_stays():
    assert run(MALLOC_TOP_PAD_="0")[3] > 16000


HUGE = """
import torch
from mokd_fast.train.malloc import freed_memory_kept, huge_pages

torch.set_num_threads(1)
with freed_memory_kept():
    for _ in range(2):
        kept = torch.ones(1 << 26)  # 256 MiB
    asked, heap, mine = huge_pages(), False, 0
    for line in open("/proc/self/smaps"):
        heap = line.rstrip().endswith("[heap]") if "-" in line.split()[0] else heap
        mine += int(line.split()[1]) << 10 if heap and line.startswith("AnonHugePages") else 0
    assert (kept == 1).all()
print(asked, mine)
"""


@glibc
@pytest.mark.skipif(
    not malloc._TRANSPARENT.exists() or "[never]" in malloc._TRANSPARENT.read_text(),
    reason="this Linux gives no huge pages",
)
def test_the_heap_in_huge_pages():
    asked, mine = run(HUGE)
    assert asked >= 256 << 20
    if tuple(map(int, platform.release().split(".")[:2])) >= (6, 1):
        assert mine >= 128 << 20  # what is fragmented stays small
    assert run(HUGE, MALLOC_TOP_PAD_="0") == [0, 0]


def test_no_huge_pages_where_the_user_wants_none(tmp_path, monkeypatch):
    never = tmp_path / "enabled"
    never.write_text("always madvise [never]\n")
    monkeypatch.setattr(malloc, "_TRANSPARENT", never)
    assert malloc.huge_pages() == 0
    monkeypatch.setattr(malloc, "_TRANSPARENT", tmp_path / "missing")
    assert malloc.huge_pages() == 0


@glibc
def test_it_lasts_as_long_as_the_steps(tmp_path, monkeypatch):
    order = []
    step = Trainer.step
    monkeypatch.setattr(malloc, "keep", lambda: order.append("keep"))
    monkeypatch.setattr(malloc, "give_back", lambda: order.append("give back"))
    monkeypatch.setattr(Trainer, "step", lambda *a: order.append("step") or step(*a))
    monkeypatch.setattr(malloc.os, "environ", {})
    recipe = small(
        pictures(tmp_path / "data", 8), "train.duration=2it", "train.warmup=1it",
        "train.freeze_last_layers=0it", models=[{**VIT, "temperature_warmup": NONE}], t_head=None,
    )  # fmt: skip
    pretrain(recipe, run=tmp_path / "run", console=silent())
    assert order == ["keep", "step", "step", "give back"]
