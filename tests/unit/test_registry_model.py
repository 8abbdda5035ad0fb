"""The registry against its worst days, as a state machine: the scripts in a real Redis, on a clock of the test's own.

Any call may be lost, run without its reply, run late or run twice; any key may expire or vanish between any two
commands; nodes restart, agents come and go. Two beats that work make the registry equal to the sessions again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from rtunnel.errors import RegistryUnavailable
from rtunnel.registry import (
    COUNTER_BITS,
    Departure,
    NodeFacts,
    NodeRecord,
    PortLease,
    Registration,
    Registry,
    Snapshot,
    Tuple,
)
from rtunnel.registry.memory import MemoryRegistry
from rtunnel.registry.redis import RedisRegistry
from rtunnel.registry.redis_client import Script
from rtunnel.registry.routes import Mirror, RouteTable
from support.effort import times
from support.redis_server import RedisServer

# Model seconds. So long that a test run, which Redis really waits for, is nothing beside them.
TTL, QUARANTINE, TIMEOUT, HEARTBEAT = 8000.0, 20_000.0, 500.0, 3000.0
#: A caller that gave up does not come back at once.
PAUSE = 1.0
BEGIN = 1_800_000_000.0
NODES, AGENTS = ("b1", "b2"), ("a1", "a2")
CLOCK_KEY = "model:time"

#: What may happen to one exchange with Redis.
OK = "it works"
LOST = "it never arrives"
UNHEARD = "its reply is lost"
LATE = "it runs after its caller has given up"
TWICE = "it runs, and again for a retry"
ECHO = "it runs, and again much later"

ADVANCE = """
for _, key in ipairs(redis.call('KEYS', '*')) do
  local left = redis.call('PTTL', key)
  if left >= 0 then
    if left <= tonumber(ARGV[1]) then redis.call('DEL', key) else redis.call('PEXPIRE', key, left - ARGV[1]) end
  end
end
redis.call('DEL', 'model:time')
redis.call('RPUSH', 'model:time', ARGV[2], ARGV[3])
"""


class Store:
    """The model's time, and the Redis whose keys grow old by it."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self.now = BEGIN
        self.late: list[Callable[[], object]] = []
        self._client = server.client()
        self._client.flushall()
        self.advance(0.0)

    def advance(self, seconds: float) -> None:
        self.now = round(self.now + seconds, 3)
        whole, part = divmod(round(self.now * 1000), 1000)
        self._client.eval(ADVANCE, 0, round(seconds * 1000), whole, part * 1000)

    def names(self) -> list[str]:
        return sorted(key for key in self._client.scan_iter() if key != CLOCK_KEY)

    def lose(self, key: str) -> None:
        self._client.delete(key)

    def hash(self, key: str) -> dict[str, str]:
        found: dict[str, str] = self._client.hgetall(key)
        return found

    def close(self) -> None:
        self._client.close()


class Faulty(RedisRegistry):
    """A client on the model's clock, with a plan of what happens to its next exchanges.

    `deadlines`: False lets late calls run, as they do while the server's clock is behind.
    """

    def __init__(self, store: Store, *, deadlines: bool) -> None:
        super().__init__(store.server.url, ttl=TTL, quarantine=QUARANTINE, timeout=TIMEOUT, clock=lambda: store.now)
        self.plan: list[str] = []
        self._beats = len(AGENTS)  # beyond the beats that write all sessions of so small a node in full
        self._store = store
        self._deadlines = deadlines
        self._scripts: dict[str, Script] = {}

    def _run(self, script: Script, *args: Any, not_after: str = "") -> Any:
        clocked = self._scripts.get(script.sha)
        if clocked is None:
            source = script.source.replace("redis.call('TIME')", f"redis.call('LRANGE', '{CLOCK_KEY}', 0, -1)")
            clocked = self._scripts[script.sha] = Script(source)
        return super()._run(clocked, *args, not_after=not_after if self._deadlines else "")

    def _exchange(self, *commands: tuple[Any, ...], wait: float = 0.0) -> list[Any]:
        def send() -> list[Any]:
            return super(Faulty, self)._exchange(*map(_clocked, commands))

        fault = self.plan.pop(0) if self.plan and commands != (("TIME",),) else OK
        if fault in (UNHEARD, TWICE):
            self._attempt(send)
        if fault in (LATE, ECHO):
            self._store.late.append(lambda: self._attempt(send))
        if fault in (LOST, UNHEARD, LATE):
            self._store.advance(TIMEOUT + PAUSE)
            raise self._unavailable(TimeoutError(fault))
        return send()

    @staticmethod
    def _attempt(send: Callable[[], object]) -> None:
        try:
            send()
        except Exception:
            pass  # nobody hears it


def _clocked(command: tuple[Any, ...]) -> tuple[Any, ...]:
    """On the model's clock: TIME is its own, and nothing blocks (Redis 6 looks at blocked clients every 0.1 s)."""
    if command == ("TIME",):
        return "LRANGE", CLOCK_KEY, 0, -1
    if "BLOCK" in command:
        at = command.index("BLOCK")
        return command[:at] + command[at + 2 :]
    return command


class Broker:
    """What a broker keeps: its sessions, and nothing about what the registry may have of them."""

    def __init__(self, name: str, registry: Registry) -> None:
        self.registry = registry
        self.record = NodeRecord(node=name, host=name, ip=f"10.0.0.{name[1:]}", incarnation=0)
        self.sessions: dict[str, Registration] = {}
        self._counter = count(1)

    def session(self, agent: str) -> Registration:
        epoch = self.record.incarnation << COUNTER_BITS | next(self._counter)
        node, ip, port = self.record.node, self.record.ip, 20000 + int(agent[1:])
        tuples = tuple(Tuple("default", f"10.{net}.0.{agent[1:]}", 0, ip, port, node, epoch, agent) for net in (1, 2))
        return Registration(epoch, tuples, (PortLease(ip, port, f"default/{agent}", node, epoch),), exposes="0")


faults = st.lists(st.sampled_from((LOST, UNHEARD, LATE, TWICE, ECHO, OK)), max_size=3)
nodes, agents = st.sampled_from(NODES), st.sampled_from(AGENTS)
#: From nothing to so long that everything has expired.
spans = st.sampled_from((1.0, HEARTBEAT, TTL / 2, TTL, TTL + QUARANTINE))


class RegistryMachine(RuleBasedStateMachine):
    """Two nodes, two agents, one reader, and notes of departures. Subclasses say where the registry is."""

    #: Calls may have run without their caller knowing: what they left is given until the next `ttl` to die.
    late_calls_run: ClassVar[bool] = False

    def connect(self) -> Registry:
        raise NotImplementedError

    def advance(self, seconds: float) -> None:
        raise NotImplementedError

    def clock(self) -> float:
        raise NotImplementedError

    def plan(self, broker: Broker, plan: list[str]) -> None:
        """What happens to the exchanges of the next call."""

    @initialize()
    def start(self) -> None:
        self.reader = self.connect()
        self.table = RouteTable(HEARTBEAT + 1, self.clock)
        self.mirror = Mirror(self.reader, self.table, reconcile=2 * HEARTBEAT, clock=self.clock)
        self.told = 0
        self.noted: dict[str, int] = {}  # by address: the newest note that was written for sure
        self.brokers = {name: Broker(name, self.connect()) for name in NODES}
        for broker in self.brokers.values():
            self._take_node_id(broker)
            for agent in AGENTS:
                self.arrive(broker.record.node, agent, [])

    def _take_node_id(self, broker: Broker) -> None:
        while True:
            try:
                incarnation = broker.registry.start_node(broker.record)
            except RegistryUnavailable:
                continue
            broker.record = msgspec.structs.replace(broker.record, incarnation=incarnation)
            return

    @rule(name=nodes, agent=agents, plan=faults)
    def arrive(self, name: str, agent: str, plan: list[str]) -> None:
        broker = self.brokers[name]
        self.plan(broker, plan)
        self._leave(broker, agent)
        session = broker.session(agent)
        try:
            assert broker.registry.lease_port(session.leases[0])
            broker.registry.register(session)
        except RegistryUnavailable:
            self._tries(lambda: broker.registry.release_port(session.leases[0]))
        else:
            broker.sessions[agent] = session
        self.plan(broker, [])

    @rule(name=nodes, agent=agents, plan=faults)
    def leave(self, name: str, agent: str, plan: list[str]) -> None:
        broker = self.brokers[name]
        self.plan(broker, plan)
        self._leave(broker, agent)
        self.plan(broker, [])

    def _leave(self, broker: Broker, agent: str) -> None:
        session = broker.sessions.pop(agent, None)
        if session is not None:
            self._tries(lambda: broker.registry.unregister(session))

    @staticmethod
    def _tries(call: Callable[[], object]) -> None:
        try:
            call()
        except RegistryUnavailable:
            pass

    @rule(name=nodes, agent=agents)
    def expose(self, name: str, agent: str) -> None:
        """The next beat takes it along."""
        sessions = self.brokers[name].sessions
        if agent in sessions:
            revision = sessions[agent].revision + 1
            sessions[agent] = msgspec.structs.replace(sessions[agent], exposes=str(revision), revision=revision)

    @rule(name=nodes, plan=faults)
    def beat(self, name: str, plan: list[str]) -> None:
        broker = self.brokers[name]
        self.plan(broker, plan)
        self._tries(lambda: self._beat(broker))
        self.plan(broker, [])

    def _beat(self, broker: Broker) -> None:
        assert broker.registry.beat(broker.record, list(broker.sessions.values())).lost == {}

    @rule(name=nodes, agent=agents, plan=faults)
    def tell(self, name: str, agent: str, plan: list[str]) -> None:
        """A departure is noted; a second later than anything before, by the registry's clock."""
        self.advance(1.0)
        broker, ip = self.brokers[name], f"10.1.0.{agent[1:]}"
        self.told += 1
        note = Departure(
            namespace="default", agent_id=agent, addresses=(ip,), node=name, peer="", cause="left", text=str(self.told),
            epoch=0,
        )  # fmt: skip
        self.plan(broker, plan)
        try:
            broker.registry.report(NodeFacts(node=name), [note])
        except RegistryUnavailable:
            pass
        else:
            self.noted[ip] = self.told
        self.plan(broker, [])

    @rule(name=nodes, fault=st.sampled_from((LOST, UNHEARD, LATE, TWICE, ECHO)), written=st.integers(0, 1))
    def freeze(self, name: str, fault: str, written: int) -> None:
        """Redis stops for longer than a tuple lives, and a beat is the first that comes when it goes on."""
        self.advance(TTL)
        self.beat(name, [OK] * written + [fault])

    @rule(name=nodes, plan=faults)
    def restart(self, name: str, plan: list[str]) -> None:
        """As after kill -9: another process, which knows nothing of the first one's calls. It takes a while to come."""
        self.advance(TIMEOUT + PAUSE)
        broker = self.brokers[name] = Broker(name, self.connect())
        self.plan(broker, plan)
        self._take_node_id(broker)
        self.plan(broker, [])

    @rule(seconds=spans)
    def wait(self, seconds: float) -> None:
        self.advance(seconds)

    @rule()
    def settle(self) -> None:
        """Two beats that work, then the comparison."""
        for _ in range(2):
            self._beat_all()
        self.mirror.follow_once(0.0)
        self._compare(strict=not self.late_calls_run)

    def _settle_for_good(self) -> None:
        """And again when the last dead heartbeat is dead, for the gateway as well."""
        self.settle()
        for _ in range(4):
            self.advance(TTL / 3)
            self._beat_all()
            self.mirror.follow_once(0.0)
        self._compare(strict=True)
        for session in self._sessions():
            for entry in session.tuples:
                known = self.table.lookup(entry.namespace, entry.agent_ip)
                assert entry in [msgspec.structs.replace(have, beat=0.0) for have in known]

    def _beat_all(self) -> None:
        for broker in self.brokers.values():
            self._beat(broker)

    def _sessions(self) -> Iterator[Registration]:
        for broker in self.brokers.values():
            yield from broker.sessions.values()

    def _compare(self, *, strict: bool) -> None:
        wanted = {
            msgspec.structs.replace(entry, exposes=session.exposes)
            for session in self._sessions()
            for entry in session.tuples
        }
        snapshot: Snapshot = self.reader.snapshot()
        addresses = {(entry.namespace, entry.agent_ip) for entry in [*wanted, *snapshot.tuples]}
        looked_up = [entry for at in addresses for entry in self.reader.lookup(*at)]
        for tuples in (snapshot.tuples, looked_up):
            found = {msgspec.structs.replace(entry, beat=0.0) for entry in self.reader.with_exposes(tuples)}
            assert wanted <= found
            assert found == wanted or not strict
        assert {record.node for record in self.reader.nodes()} == set(NODES)
        for ip, told in self.noted.items():
            [departure] = self.reader.history("default", ip).departures
            assert told <= int(departure.text) <= self.told, "an older note has replaced a newer one"
        thief = Broker("b9", self.reader)
        for session in self._sessions():
            for lease in session.leases:
                other = msgspec.structs.replace(lease, owner="default/thief", node=thief.record.node, epoch=1)
                assert not self.reader.lease_port(other)

    def teardown(self) -> None:
        if hasattr(self, "brokers"):
            self._settle_for_good()


class RedisMachine(RegistryMachine):
    """With every fault; calls whose callers have given up do nothing."""

    server: ClassVar[RedisServer]

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(self.server)
        self.opened: list[Faulty] = []

    def connect(self) -> Registry:
        self.opened.append(Faulty(self.store, deadlines=not self.late_calls_run))
        return self.opened[-1]

    def advance(self, seconds: float) -> None:
        self.store.advance(seconds)

    def clock(self) -> float:
        return self.store.now

    def plan(self, broker: Broker, plan: list[str]) -> None:
        assert isinstance(broker.registry, Faulty)
        broker.registry.plan = list(plan)

    @rule(data=st.data())
    def lose_a_key(self, data: st.DataObject) -> None:
        """It expired, or was evicted, between any two commands."""
        keys = self.store.names()
        assume(keys)
        key = data.draw(st.sampled_from(keys))
        self.store.lose(key)
        if key.startswith("rtunnel:gone:"):
            self.noted.pop(key.rpartition(":")[2], None)

    @precondition(lambda self: self.store.late)
    @rule(data=st.data())
    def run_a_late_call(self, data: st.DataObject) -> None:
        self.store.advance(TIMEOUT + PAUSE)
        self.store.late.pop(data.draw(st.integers(0, len(self.store.late) - 1)))()

    def _compare(self, *, strict: bool) -> None:
        super()._compare(strict=strict)
        for key in self.store.names():
            if key.startswith("rtunnel:target:"):
                fields = self.store.hash(key)
                for beat in fields:
                    field, found, epoch = beat.partition("@")
                    assert not found or f'"epoch":"{epoch}"' in fields[field], "a heartbeat without its tuple"

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            for registry in self.opened:
                registry.close()
            self.store.close()


class LateRedisMachine(RedisMachine):
    """The same, and late calls do run: what they leave dies with the next `ttl`."""

    late_calls_run = True

    @rule(name=nodes)
    def restart(self, name: str, plan: None = None) -> None:
        """Without faults: a START that runs late takes the node_id, and is what deadlines are for."""
        super().restart(name, [])


class MemoryMachine(RegistryMachine):
    """In one process no call is lost; time, restarts and wipes remain."""

    def __init__(self) -> None:
        super().__init__()
        self.now = BEGIN
        self.registry = MemoryRegistry(TTL, QUARANTINE, self.clock)

    def connect(self) -> Registry:
        return self.registry

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def clock(self) -> float:
        return self.now

    @rule()
    def wipe(self) -> None:
        self.registry.wipe()
        self.noted.clear()


@pytest.mark.parametrize("machine", [RedisMachine, LateRedisMachine])
def test_two_beats_make_redis_equal_to_the_sessions(redis_server: RedisServer, machine: type[RedisMachine]) -> None:
    machine.server = redis_server
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=times(12), stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_two_beats_make_the_memory_registry_equal_to_the_sessions() -> None:
    run_state_machine_as_test(
        MemoryMachine, settings=settings(max_examples=times(20), stateful_step_count=25, deadline=None)
    )


def test_start_that_comes_late_does_not_take_the_node_id_back(redis_server: RedisServer) -> None:
    """It waited in a frozen Redis, while the next try of the same process came through."""
    store = Store(redis_server)
    registry = Faulty(store, deadlines=True)
    broker = Broker("b1", registry)
    registry.plan = [LATE]
    with pytest.raises(RegistryUnavailable):
        registry.start_node(broker.record)
    incarnation = registry.start_node(broker.record)
    [late] = store.late
    late()
    registry.beat(msgspec.structs.replace(broker.record, incarnation=incarnation), [])
    assert [node.incarnation for node in registry.nodes()] == [incarnation]
    registry.close()
    store.close()
