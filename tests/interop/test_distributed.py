"""Two gloo processes: the centre is that of one process with both batches."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.interop.cases import CASES, MASK, MASKED_ROWS_ONLY, B, K, T, center_of, logits

CASE = {case.name: case for case in CASES}


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    centers = {}
    for case in CASES:
        loss = case.build().double()
        for step in range(2):
            case.call(loss, *logits(2 * step + rank))
        centers[case.name] = center_of(case, loss)
    patch = CASE["dinov2 patch"].build().double()
    # Ranks weigh the same whatever they hold: all the patches here, the masked ones there; one
    # that has none does not count.
    teacher = logits(rank)[1]
    for rows in (teacher if rank else teacher[MASK], teacher[: 2 * rank]):
        patch.update_center(rows.reshape(1, -1, K))
        patch.softmax_center_teacher(teacher, 0.1)
    centers["ragged"] = patch.center.flatten()
    sinkhorn = CASE["dinov2"].build()
    centers["sinkhorn"] = sinkhorn.sinkhorn_knopp_teacher(logits(rank)[1].flatten(0, 1), 0.5)
    alone = CASE["dinov3"].build().double()
    groups = [dist.new_group([0]), dist.new_group([1])]
    alone.process_group = groups[rank]
    alone.update_center(teacher)
    centers["group"] = alone.state_dict()["center"].flatten()
    torch.save(centers, f"{folder}/{rank}")
    dist.destroy_process_group()


def test_the_center_of_two_processes(tmp_path):
    mp.start_processes(_worker, (str(tmp_path),), nprocs=2, start_method="fork")
    zero, one = (torch.load(tmp_path / str(rank)) for rank in range(2))
    for case in CASES:
        both = case.build().double()
        for step in range(2):
            pair = [logits(2 * step + rank)[1] for rank in range(2)]
            _update(both, case.name, pair)
        torch.testing.assert_close(zero[case.name], center_of(case, both).to(zero[case.name]))
        assert torch.equal(zero[case.name], one[case.name])
    first, second = (logits(rank)[1] for rank in range(2))
    mean = (first[MASK].mean(0) + second.mean((0, 1))) / 2
    expected = 0.9 * 0.1 * mean + 0.1 * second.mean((0, 1))
    torch.testing.assert_close(zero["ragged"], expected)
    assert torch.equal(zero["ragged"], one["ragged"])
    loss = CASE["dinov2"].build()
    together = loss.sinkhorn_knopp_teacher(torch.cat([first, second]).flatten(0, 1), 0.5)
    found = torch.cat([zero["sinkhorn"], one["sinkhorn"]])
    torch.testing.assert_close(found, together)
    assert len(found) == 2 * T * B
    for centers, teacher in ((zero, first), (one, second)):
        torch.testing.assert_close(centers["group"], 0.1 * teacher.mean((0, 1)))


def _update(loss, name, teachers) -> None:
    """The centre of one process that has the batches of both."""
    if name == "mokd search":
        return
    masked = name in MASKED_ROWS_ONLY
    rows = torch.cat([t[MASK] if masked else t.flatten(0, 1) for t in teachers])
    if name.startswith("ibot"):
        loss.update_center(rows, rows.unsqueeze(0))
    elif name == "lightly patch":
        loss.center.update(rows)
    else:
        loss.update_center(rows)
        loss.state_dict()  # applies a pending one
