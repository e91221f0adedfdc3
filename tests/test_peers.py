"""What ranks tell one another: looked at from the other end of one rank's lines."""

import os
import socket
import time

import pytest

from mde_dist.distributed import heartbeat as peers
from mde_dist.distributed.signals import PreemptionHandler


@pytest.fixture
def hub(tmp_path):
    """Rank 0 of three, and the other ends of its lines to ranks 1 and 2."""
    pairs = {rank: socket.socketpair() for rank in (1, 2)}
    rank = peers._Heartbeat(0, {number: ours for number, (ours, _) in pairs.items()}, PreemptionHandler(), 30, tmp_path)
    yield rank, {number: theirs for number, (_, theirs) in pairs.items()}
    rank.close()
    for _, theirs in pairs.values():
        theirs.close()


def heard(line: socket.socket, seconds: float) -> list[int]:
    """The events that come within some time."""
    data, end = b"", time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        line.settimeout(left)
        try:
            data += line.recv(4096)
        except TimeoutError:
            break
    return [event for event, _ in peers._MESSAGE.iter_unpack(data)]


def wait_until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_sign_of_life_is_not_answered_with_another(hub):
    """Two ranks that answer one another do it thousands of times a second."""
    _, lines = hub
    for _ in range(50):
        lines[1].send(peers._MESSAGE.pack(peers._BEAT, 1))
        time.sleep(0.01)
    assert 1 <= heard(lines[2], 1.1).count(peers._BEAT) <= 6


def test_a_rank_that_ends_because_of_another_is_not_named_with_it(hub, monkeypatch):
    rank, lines = hub
    lines[2].close()
    wait_until(rank._loss_known.is_set)
    # what the third one does when it has waited long enough for the second, is what the first one does
    monkeypatch.setattr(os, "_exit", lambda code: None)
    monkeypatch.setattr(peers, "emergency_print", lambda text, terminal: None)
    rank._end_here()
    assert heard(lines[1], 0.3)[-1] == peers._GOODBYE
    lines[1].send(peers._MESSAGE.pack(peers._GOODBYE, 1))
    lines[1].close()
    wait_until(lambda: not rank._connections[1].open)
    time.sleep(0.1)
    assert rank._loss_message().startswith("rank 2 is gone; ")
