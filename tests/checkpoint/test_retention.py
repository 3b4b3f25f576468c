"""checkpoint/retention.py: what stays is what was asked for, whatever was interrupted."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from archscale_megatron.checkpoint import retention
from tests.checkpoint.directories import write_checkpoint, write_run


def join() -> None:
    for thread in threading.enumerate():
        if thread.name == "deletion of checkpoints":
            thread.join()


@pytest.mark.parametrize(
    "keep_last, permanent, expected",
    [
        (None, None, []),
        (1, None, [2, 4, 6, 8]),
        (2, None, [2, 4, 6]),
        (9, None, []),
        (None, 4, [2, 6]),  # as Megatron: the last one, and multiples
        (1, 4, [2, 6]),
        (2, 4, [2, 6]),  # 8 is permanent, and one of the last two
        (3, 8, [2, 4]),
    ],
)
def test_expired(tmp_path: Path, keep_last: int | None, permanent: int | None, expected: list[int]) -> None:
    run = write_run(tmp_path / "run", 2, 4, 6, 8, 10)
    found = retention.expired(run, 10, keep_last, permanent)
    assert [retention.iteration_of(path) for path in found] == expected


def test_expired_after_interruptions(tmp_path: Path) -> None:
    """Half-written ones before the newest go and do not count; Megatron's own, links, what is pending, and the future
    of a rewound run stay."""
    run = write_run(tmp_path / "run", 2, 8, 14)
    for iteration in (4, 10, 12):
        write_checkpoint(run / f"iter_{iteration:07d}", whole=False)
    own = write_checkpoint(run / "iter_0000006", whole=False)
    for sidecar in own.glob("*.digest"):
        sidecar.unlink()
    (run / "iter_0000001").symlink_to(run / "iter_0000002")
    (run / "iter_latest").mkdir()
    found = retention.expired(run, 12, 2, None, pending=[run / "iter_0000010"])
    assert [retention.iteration_of(path) for path in found] == [2, 4]


def test_deletion_is_invisible_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", 2, 4)
    with monkeypatch.context() as patch:  # as if the program were killed before it deletes a file
        patch.setattr(retention, "_remove", lambda hidden: None)
        retention.delete(run / "iter_0000002")
    assert list(retention.checkpoints(run)) == [4]
    assert len(list(run.glob(".deleted-iter_0000002-*/manifest.json"))) == 1
    retention.sweep(run)
    retention.delete(run / "iter_0000004")
    join()
    assert [path.name for path in run.iterdir()] == ["latest_checkpointed_iteration.txt"]
