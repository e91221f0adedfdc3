"""Messages between ranks beside their collectives, which wait for ever: who was signalled, and who is gone.

Every rank holds one TCP connection to rank 0. A process that dies closes it at once; a machine that dies, a link that
is cut and a process that is stopped fall silent. Rank 0 tells the others, and each ends within seconds instead of
waiting in a collective that never ends. A message is five bytes that name an event and a number; nothing else is
read.
"""

import os
import secrets
import selectors
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import distributed

from mde_dist.distributed.process_group import run_on_all_ranks
from mde_dist.distributed.rank_log import emergency_print, log_path, log_was_opened
from mde_dist.distributed.signals import PreemptionHandler
from mde_dist.utils.errors import OtherRankError, RankError, UserError

_MESSAGE = struct.Struct("!Bi")  # event, number
_HELLO = struct.Struct("!qi")  # token, rank
_BEAT, _STOP, _LOST, _GOODBYE = range(4)
_TICK = 0.5  # seconds between two signs of life
_LOSS_WAIT = 5.0  # seconds to wait after a failed collective for the news of which rank is lost
_GRACE = 10.0  # seconds that a rank has to end by itself once another one is lost


@contextmanager
def monitor_ranks(
    accelerator: Accelerator, stop: PreemptionHandler, timeout: float = 30.0, run: Path | None = None
) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Within the block a signal to one rank stops all, and a rank that is lost ends the others.

    Where a collective fails for it, RankError is raised on the lowest rank of each node that is left, which names the
    lost one (and its log in `run`), and OtherRankError on the rest; where the main thread hangs in a collective, the
    process says so and exits. `timeout`: seconds without a sign of life after which a rank is lost. Yields a context
    manager that does the same for a block further inside. Raises UserError where rank 0 cannot be reached.
    """
    if accelerator.num_processes == 1:
        yield nullcontext
        return
    heartbeat = _connect_ranks(accelerator, stop, timeout, run)
    try:
        with heartbeat.explain_lost_ranks():
            yield heartbeat.explain_lost_ranks
        heartbeat.goodbye = True
    finally:
        heartbeat.close()


def _connect_ranks(accelerator: Accelerator, stop: PreemptionHandler, timeout: float, run: Path | None) -> "_Heartbeat":
    """Connect all ranks to rank 0. Raises UserError where one cannot be reached."""
    rank, world = accelerator.process_index, accelerator.num_processes
    server = run_on_all_ranks(accelerator, lambda: _listen(world) if rank == 0 else None)
    port = server.getsockname()[1] if server else 0
    # the token keeps strangers out, who may knock at any port of a cluster
    address = torch.tensor([port, secrets.randbits(62)], device=accelerator.device)
    distributed.broadcast(address, src=0)
    port, token = address.tolist()

    def connect() -> dict[int, socket.socket]:
        return _accept(server, token, world) if server else {0: _connect(port, token, rank)}

    return _Heartbeat(rank, run_on_all_ranks(accelerator, connect), stop, timeout, run)


def _listen(backlog: int) -> socket.socket:
    """For IPv6 as well, where the system has it: MASTER_ADDR may be such an address, or a name that stands for one."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


def _connect(port: int, token: int, rank: int) -> socket.socket:
    host = os.environ["MASTER_ADDR"]
    try:
        connection = socket.create_connection((host, port), timeout=60)
    except OSError as error:
        raise RankError(f"rank 0 cannot be reached at {host}, port {port}: {error}") from None
    connection.sendall(_HELLO.pack(token, rank))
    return connection


def _accept(server: socket.socket, token: int, world: int) -> dict[int, socket.socket]:
    connections: dict[int, socket.socket] = {}
    end = time.monotonic() + 60
    with server:
        while len(connections) < world - 1:
            server.settimeout(max(0.01, end - time.monotonic()))
            try:
                connection, _ = server.accept()
                connection.settimeout(5)
                received, rank = _HELLO.unpack(connection.recv(_HELLO.size, socket.MSG_WAITALL))
            except (OSError, struct.error):
                if time.monotonic() > end:
                    missing = sorted(set(range(1, world)) - set(connections))
                    raise UserError(f"ranks {missing} did not call rank 0 within a minute") from None
                continue
            if received == token and 0 < rank < world:
                connections[rank] = connection
    return connections


@dataclass
class _Connection:
    """The connection to one other rank."""

    socket: socket.socket
    last_seen: float
    """Time of the last sign of life; time.monotonic()."""
    partial: bytes = b""
    """Bytes of a message that has come in part."""
    open: bool = True
    """False once the other rank has received goodbye or is lost."""


class _Heartbeat:
    """This rank's connections: to all others on rank 0, to rank 0 elsewhere. One thread sends and receives."""

    def __init__(
        self, rank: int, sockets: dict[int, socket.socket], stop: PreemptionHandler, timeout: float, run: Path | None
    ):
        self.goodbye = False
        """True once this rank leaves in good order."""
        self._leaving = False  # the main thread is on its way out, however long that takes, and hangs nowhere
        self._rank, self._stop, self._timeout, self._run = rank, stop, timeout, run
        self._connections = {peer: _Connection(connection, time.monotonic()) for peer, connection in sockets.items()}
        self._lost: dict[int, str] = {}  # rank -> how it was noticed, in the order in which they went
        self._loss_known, self._closed, self._stop_sent = threading.Event(), False, False
        self._selector = selectors.DefaultSelector()
        for peer, connection in self._connections.items():
            connection.socket.setblocking(False)
            self._selector.register(connection.socket, selectors.EVENT_READ, peer)
        self._thread = threading.Thread(target=self._loop, name="peers", daemon=True)
        self._thread.start()

    @contextmanager
    def explain_lost_ranks(self) -> Iterator[None]:
        """Turn the failure of a collective into words about the rank that failed it."""
        try:
            yield
        except BaseException as error:
            self._leaving = True
            # whose loss it was is known a moment later; if nobody's, it is an error of this rank's own
            if not isinstance(error, RuntimeError) or not self._loss_known.wait(_LOSS_WAIT):
                raise
            time.sleep(_TICK)  # the ranks of a machine go together
            self.goodbye = True  # so that this rank is not reported as lost
            raise (RankError if self._is_reporter() else OtherRankError)(self._loss_message()) from None

    def close(self) -> None:
        self._closed = True
        self._thread.join()
        self._selector.close()
        if self.goodbye:
            self._send(_GOODBYE, self._rank)
        for connection in self._connections.values():
            connection.socket.close()

    def _loop(self) -> None:
        next_beat = lost_since = 0.0
        while not self._closed:
            now = time.monotonic()
            if now >= next_beat:  # not whenever something was last_seen, or signs of life would answer one another
                next_beat = now + _TICK
                self._send(_BEAT, self._rank)
            if self._stop.signal is not None and not self._stop_sent:
                self._stop_sent = True
                self._send(_STOP, self._stop.signal)
            for key, _ in self._selector.select(next_beat - now):
                self._receive(key.data, self._connections[key.data])
            now = time.monotonic()
            for peer, connection in self._connections.items():
                if connection.open and now - connection.last_seen > self._timeout:
                    self._mark_lost(peer, f"has given no sign of life for {self._timeout:g} s")
            if self._lost and not lost_since:
                lost_since = now
            if lost_since and now - lost_since > _GRACE and not (self._leaving or self._closed):
                self._end_here()

    def _receive(self, peer: int, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(connection.socket)
            if connection.open:
                self._mark_lost(peer, "is gone")
            return
        connection.last_seen, data = time.monotonic(), connection.partial + data
        whole = len(data) // _MESSAGE.size * _MESSAGE.size
        connection.partial = data[whole:]
        for event, number in _MESSAGE.iter_unpack(data[:whole]):
            if event == _STOP and self._stop.signal is None:
                self._stop.signal = signal.Signals(number)
            elif event == _LOST:
                self._mark_lost(number, "is gone")
            elif event == _GOODBYE:
                connection.open = False

    def _mark_lost(self, rank: int, reason: str) -> None:
        if rank in self._connections:
            self._connections[rank].open = False
        self._lost.setdefault(rank, reason)
        self._send(_LOST, rank)
        self._loss_known.set()

    def _send(self, event: int, number: int) -> None:
        """Send to all ranks that are connected; a lost one is noticed elsewhere."""
        for connection in self._connections.values():
            if connection.open:
                with suppress(OSError):
                    connection.socket.send(_MESSAGE.pack(event, number))

    def _is_reporter(self) -> bool:
        """Say whether this rank is the one of its node that writes to the terminal."""
        local, here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        first = self._rank - local
        return self._rank == min(rank for rank in range(first, first + here) if rank not in self._lost)

    def _loss_message(self) -> str:
        ranks, reason = sorted(self._lost), next(iter(self._lost.values()))
        who = f"rank {ranks[0]} {reason}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are gone"
        log = log_path(self._run, next(iter(self._lost))) if self._run is not None and log_was_opened() else None
        where = f"; log: {log}" if log is not None and log.is_file() else ""  # else it spoke on its terminal
        return f"{who}{where}; the same command goes on from the last checkpoint"

    def _end_here(self) -> None:
        """The main thread hangs in a collective, from which nothing else can call it back."""
        emergency_print(f"error (rank {self._rank}): {self._loss_message()}", terminal=self._is_reporter())
        self._send(_GOODBYE, self._rank)  # so that this rank is not reported as lost, too
        os._exit(2)
