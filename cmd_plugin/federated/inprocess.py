"""Flower clients in this process, one after another: no ray, no sockets, no start-up time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from cmd_plugin.errors import StateMismatch
from cmd_plugin.federated._memory import read_records, save_records

__all__ = ["InProcessGrid"]

_RUN = 1
_SERVER_NODE = 1  # the number Flower gives to the SuperLink
_CLIENT_RAISED = 2  # the codes Flower's engines use
_NODE_UNAVAILABLE = 5


class InProcessGrid(Grid):
    """A Flower ``Grid`` whose nodes run a ``ClientApp`` in this process.

    The same ServerApp and ClientApp run unchanged on it, on Flower's simulation engine and in a
    deployment. Each node has a ``Context`` of its own that lives as long as the grid. A client that
    raises becomes an error reply, as in Flower's engines. Nodes have fixed 64-bit numbers, and
    ``get_node_ids`` lists them in the order of ``node_configs``.

    Args:
        app: The client app.
        node_configs: One configuration for each node, for example
            ``{"partition-id": 0, "num-partitions": 4}``.
        run_config: The run's configuration, the same for all.

    Attributes:
        contexts: Context of each node by its number. Take one out and the node has left.
    """

    def __init__(
        self,
        app: ClientApp,
        node_configs: Sequence[Mapping[str, Any]],
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        self._app = app
        self._run_config = dict(run_config or {})
        self._sent = 0
        self.contexts: dict[int, Context] = {}
        _identify()
        for number, config in enumerate(node_configs):
            self.add_node(number, config)

    def add_node(self, number: int, config: Mapping[str, Any]) -> int:
        """Let a node join; its node number is returned.

        Args:
            number: Any number that no other node has.
            config: Its node configuration.
        """
        digest = hashlib.sha256(f"node {number}".encode()).digest()
        node = int.from_bytes(digest[:8], "little") | 1 << 62
        self.contexts[node] = Context(
            run_id=_RUN,
            node_id=node,
            node_config=cast(Any, dict(config)),
            state=RecordDict(),
            run_config=cast(Any, dict(self._run_config)),
        )
        return node

    def state_dict(self) -> dict[str, Any]:
        """Return what all clients keep in their contexts, to be saved between two rounds.

        It holds tensors on the CPU, numbers, strings, lists and dicts only.
        """
        contexts = [[node, save_records(c.state)] for node, c in self.contexts.items()]
        return {"sent": self._sent, "contexts": contexts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give all clients back what :meth:`state_dict` returned.

        Raises:
            StateMismatch: If it is of other nodes, or damaged; nothing is changed then.
        """
        try:
            sent = int(state["sent"])
            states = {int(node): read_records(rows) for node, rows in state["contexts"]}
        except StateMismatch:
            raise
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise StateMismatch(
                f"the clients' state is damaged ({error!r}): start anew."
            ) from error
        if [*states] != [*self.contexts]:
            raise StateMismatch(
                f"the saved state is of {len(states)} other nodes than these {len(self.contexts)}: "
                "let the same ones join first."
            )
        self._sent = sent
        for node, records in states.items():
            self.contexts[node].state = records

    def set_run(self, run: Any) -> None:
        """There is one run only."""

    @property
    def run(self) -> Any:
        """There is no run information."""
        raise NotImplementedError("an in-process grid has no run information.")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message, in the way Flower deprecates."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the numbers of all nodes."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Not offered: clients run while the server waits, in :meth:`send_and_receive`."""
        raise NotImplementedError("an in-process grid answers send_and_receive() only.")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Not offered: clients run while the server waits, in :meth:`send_and_receive`."""
        raise NotImplementedError("an in-process grid answers send_and_receive() only.")

    def send_and_receive(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,  # noqa: ARG002 Flower's signature; nothing is waited for
    ) -> Iterable[Message]:
        """Run the client of each message, and return the replies in the order of the nodes."""
        place = {node: number for number, node in enumerate(self.contexts)}
        ordered = sorted(messages, key=lambda m: place.get(m.metadata.dst_node_id, len(place)))
        return [self._deliver(message) for message in ordered]

    def _deliver(self, message: Message) -> Message:
        self._sent += 1
        # As long as the content hashes that Flower's deployment engine uses.
        message.metadata.__dict__["_message_id"] = f"{self._sent:064x}"
        context = self.contexts.get(message.metadata.dst_node_id)
        if context is None:
            reply = Message(Error(_NODE_UNAVAILABLE, "Node Unavailable"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = _SERVER_NODE
            return reply
        # Flower's strategies send one content object to all: what a client replaces in its own
        # must not reach the others.
        received = Message(
            content=RecordDict(dict(message.content.items())),
            dst_node_id=message.metadata.dst_node_id,
            message_type=message.metadata.message_type,
        )
        received.metadata.__dict__.update(message.metadata.__dict__)
        try:
            return self._app(received, context)
        except Exception as error:  # as Flower's engines do: whatever it was, the run goes on
            text = f"{type(error).__name__}: {error}"
            return Message(Error(_CLIENT_RAISED, text), reply_to=message)


def _identify() -> None:
    """Say which run this process belongs to, as Flower's engines do; older versions need not."""
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:
        return
    TaskIdentity.run_id = _RUN
    TaskIdentity.node_id = _SERVER_NODE
    TaskIdentity.task_id = 1
