"""What was sent, counted from Flower's own messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from cmd_plugin.errors import StateMismatch
from cmd_plugin.federated._flower import payload_bytes, serialised_bytes

__all__ = ["MeteredGrid", "Traffic"]


@dataclass
class Traffic:
    """Messages and bytes in both directions.

    *Payload* is what Flower calls ``count_bytes``: values and their names. *Message bytes* are
    those of the serialised messages: every object of the message's tree with its header. What a
    transport adds to that (HTTP requests and their headers, polling) is the *wire*; it is not
    counted here, ``docs/federated.md`` says how it follows.

    Attributes:
        messages_down: Number of messages to clients.
        messages_up: Number of replies, errors included.
        payload_down: Payload to clients, bytes.
        payload_up: Payload from clients, bytes.
        bytes_down: Message bytes to clients.
        bytes_up: Message bytes from clients.
        plain_down: Message bytes to clients, had the model been sent as plain arrays.
        plain_up: Message bytes from clients, had the model been sent as plain arrays.
    """

    messages_down: int = 0
    messages_up: int = 0
    payload_down: int = 0
    payload_up: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    plain_down: int = 0
    plain_up: int = 0

    def count_down(self, message: Message, plain: int | None = None) -> None:
        """Count a message to a client; ``plain`` is its size with plain arrays, if another."""
        size = serialised_bytes(message)
        self.messages_down += 1
        self.payload_down += payload_bytes(message.content)
        self.bytes_down += size
        self.plain_down += size if plain is None else plain

    def count_up(self, message: Message) -> int:
        """Count a reply, and return its message bytes; :attr:`plain_up` is for the caller."""
        size = serialised_bytes(message)
        self.messages_up += 1
        self.payload_up += payload_bytes(message.content) if message.has_content() else 0
        self.bytes_up += size
        return size

    def state_dict(self) -> dict[str, int]:
        """Return the counters by name."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, int]) -> Traffic:
        """Return the counters that :meth:`state_dict` described.

        Raises:
            StateMismatch: If they are not all there, as whole numbers.
        """
        names = [field.name for field in fields(cls)]
        if [*state] != names or not all(type(count) is int for count in state.values()):
            raise StateMismatch("the saved counts of messages and bytes are damaged: start anew.")
        return cls(**state)


class MeteredGrid(Grid):
    """A Grid that counts every message that goes through another one.

    Args:
        grid: The engine's grid.

    Attributes:
        traffic: What went through.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.traffic = Traffic()

    def set_run(self, run: Any) -> None:
        """Hand on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Hand on."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Hand on."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Hand on."""
        return list(self._grid.get_node_ids())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Count and hand on."""
        messages = list(messages)
        for message in messages:
            self.traffic.count_down(message)
        return list(self._grid.push_messages(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand on and count."""
        replies = list(self._grid.pull_messages(message_ids))
        self._count_up(replies)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Count both ways."""
        messages = list(messages)
        for message in messages:
            self.traffic.count_down(message)
        replies = list(self._grid.send_and_receive(messages, timeout=timeout))
        self._count_up(replies)
        return replies

    def _count_up(self, replies: list[Message]) -> None:
        for reply in replies:
            size = self.traffic.count_up(reply)
            self.traffic.plain_up += size
