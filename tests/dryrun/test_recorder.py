"""The recorder's bytes, on storages of known size and over a fake process group of four."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from archscale_megatron.dryrun.recorder import Recorder

RANKS, BYTES = 4, 4 * 120


@pytest.fixture(scope="module", autouse=True)
def four_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=RANKS)
    yield
    dist.destroy_process_group()


def test_storages_are_followed_until_they_are_freed() -> None:
    with Recorder({}) as recorder:
        a = torch.zeros(100)
        view = a.view(10, 10)[1:]
        a.add_(1)
        assert recorder.live == 400
        b = a + 1
        assert (recorder.live, recorder.peak) == (800, 800)
        del a
        assert recorder.live == 800  # its view is alive
        del view
        assert recorder.live == 400
        c = torch.cat([b, b]).half()  # 800 bytes that are gone, then 400
        assert (recorder.live, recorder.peak) == (800, 1600)
        del b, c
        assert recorder.live == 0


def test_what_autograd_keeps_is_followed() -> None:
    weight = torch.ones(50, 50, requires_grad=True)
    x = torch.ones(2, 50)
    with Recorder({}) as recorder:
        loss = ((x @ weight) ** 2).sum()  # keeps the product, 400 bytes; the loss is 4
        assert recorder.live == 404
        loss.backward()
        del loss
        assert recorder.live == 50 * 50 * 4  # the gradient


def collective(name: str) -> Callable[[], object]:
    whole, part = torch.zeros(120), torch.zeros(30)
    return {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather([torch.zeros(30) for _ in range(RANKS)], part),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(part, whole),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.zeros(120), whole),
        "broadcast": lambda: dist.broadcast(whole, 0),
        "send": lambda: dist.send(whole, 2),
        "recv": lambda: dist.recv(whole, 2),
        "barrier": dist.barrier,
    }[name]


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("all_reduce", 2 * 3 / 4 * BYTES), ("all_gather", 3 / 4 * BYTES), ("all_gather_into_tensor", 3 / 4 * BYTES),
        ("reduce_scatter_tensor", 3 / 4 * BYTES), ("all_to_all_single", 3 / 4 * BYTES), ("broadcast", BYTES),
        ("recv", 0), ("barrier", 0),
    ],
)  # fmt: skip
def test_bytes_sent_in_a_ring(name: str, sent: float) -> None:
    operation = collective(name)
    with Recorder({dist.group.WORLD.group_name: "TP"}) as recorder:
        operation()
    assert recorder.sent == {"TP": sent}


def test_messages_between_two_ranks_are_the_pipelines() -> None:
    operation = collective("send")
    with Recorder({dist.group.WORLD.group_name: "TP"}) as recorder:
        operation()
    assert recorder.sent == {"PP": BYTES}


def test_groups_without_a_name_are_other() -> None:
    group = dist.new_group([0, 1])
    with Recorder({}) as recorder:
        dist.all_reduce(torch.zeros(120), group=group)
    assert recorder.sent == {"other": BYTES}


def test_unknown_collective_is_not_overlooked() -> None:
    with pytest.raises(NotImplementedError, match="reduce_"), Recorder({}):
        dist.reduce(torch.zeros(1), 0)
