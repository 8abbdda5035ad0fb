"""Two hosts with one agent_id: what proves a restart, and what is remembered of a second host."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from rtunnel.wire import messages
from rtunnel.wire.messages import Hello
from rtunnel_agent.host import HOST_ID_BYTES, host_id
from rtunnel_agent.identity import locked
from rtunnel_broker import duplicates as module
from rtunnel_broker.duplicates import MAX_REPLACED, Duplicates, is_restart, place, replaced_by
from rtunnel_broker.session import Session

# --- the host id ------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """What the kernel of a machine says."""
    root = tmp_path / "root"
    for path, text in {
        "proc/sys/kernel/random/boot_id": "5d1b1c9e-boot\n",
        "proc/self/ns/net": "",
        "etc/machine-id": "0123456789abcdef\n",
        "sys/class/net/eth0/address": "52:54:00:00:00:01\n",
        "sys/class/net/eth0/device": "",
        "sys/class/net/docker0/address": "02:42:00:00:00:01\n",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_a_restart_has_the_same_host_id(tmp_path: Path, machine: Path) -> None:
    """With a directory and without: two processes one after the other, whatever bridges of containers do meanwhile."""
    with locked(str(tmp_path / "identity")):
        first = host_id(str(tmp_path / "identity"), machine)
    bare = host_id("", machine)
    write(machine, "sys/class/net/docker0/address", "02:42:00:00:00:02\n")
    write(machine, "sys/class/net/veth1/address", "02:42:00:00:00:03\n")
    with locked(str(tmp_path / "identity")):
        assert host_id(str(tmp_path / "identity"), machine) == first
    assert host_id("", machine) == bare
    assert len({first, bare}) == 2 and len(first) == len(bare) == HOST_ID_BYTES


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("proc/sys/kernel/random/boot_id", "another-boot"),
        ("etc/machine-id", "another"),
        ("sys/class/net/eth0/address", "52:54:00:00:00:02"),
    ],
)
def test_another_machine_has_another_host_id(tmp_path: Path, machine: Path, path: str, text: str) -> None:
    """The directory came along, byte by byte; so did most of the machine."""
    with locked(str(tmp_path / "identity")):
        here = host_id(str(tmp_path / "identity"), machine)
        write(machine, path, text)
        assert host_id(str(tmp_path / "identity"), machine) != here


def test_a_copied_directory_has_another_host_id(tmp_path: Path, machine: Path) -> None:
    """Two containers of one image, or a backup that was put beside: the lock is another file."""
    with locked(str(tmp_path / "identity")):
        here = host_id(str(tmp_path / "identity"), machine)
        shutil.copytree(tmp_path / "identity", tmp_path / "copy")
        with locked(str(tmp_path / "copy")):
            assert (tmp_path / "copy/host.secret").read_bytes() == (tmp_path / "identity/host.secret").read_bytes()
            assert host_id(str(tmp_path / "copy"), machine) != here


def test_without_a_boot_id_nothing_is_claimed(tmp_path: Path) -> None:
    """An empty host id proves nothing: the broker asks the older link."""
    assert host_id("", tmp_path) == b""
    assert host_id("") != b""  # on this machine


# --- what proves a restart --------------------------------------------------------------------------------------------


def session(instance: int, host: bytes = b"host", addresses: tuple[str, ...] = ("10.1.0.7",), **fields: Any) -> Session:
    made = Session(cast(Any, None), source="10.9.0.1")
    made.hello = Hello(
        version=messages.VERSION, agent_id="a1", instance=bytes([instance]) * 16, namespace="default",
        addresses=list(addresses), nonce=b"n" * 16, host_id=host, host="host-7",
    )  # fmt: skip
    made.addresses = frozenset(addresses)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_only_another_process_of_the_same_host_replaces_at_once() -> None:
    """Not another host, not one that says nothing, not the same process, not one with other addresses."""
    older = session(1)
    assert is_restart(older, session(2))
    assert not is_restart(older, session(2, b"other"))
    assert not is_restart(session(1, b""), session(2, b""))
    assert not is_restart(older, session(1))
    assert not is_restart(older, session(2, addresses=("10.2.0.7",)))
    assert is_restart(older, session(2, addresses=("10.1.0.8", "10.1.0.7")))


def test_a_process_that_was_replaced_does_not_come_back() -> None:
    """When it does both live, though they have one host id: from then on the older link is asked."""
    first, second = session(1), session(2)
    second.replaced = replaced_by(first)
    assert not is_restart(second, session(1))
    assert is_restart(second, session(3))
    newest = second
    for number in range(3, 3 + 2 * MAX_REPLACED):
        following = session(number)
        following.replaced = replaced_by(newest)
        newest = following
    assert len(newest.replaced) == MAX_REPLACED


# --- what is remembered -----------------------------------------------------------------------------------------------


class Peer:
    """A link, as far as its peer is asked for."""

    def __init__(self, peer: str) -> None:
        self.peer = peer


def test_the_latest_second_hosts_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry for an agent and refused host, with its tries; a line in the log for the first; an end, and a limit."""
    monkeypatch.setattr(module, "MAX_KNOWN", 3)
    now = [1000.0]
    known = Duplicates(lambda: now[0])
    entry, is_news = known.add(session(2, link=Peer("10.0.0.6")), "host-7 (10.0.0.5)")
    assert is_news
    assert (entry.agent_id, entry.holder, entry.refused) == ("a1", "host-7 (10.0.0.5)", "host-7 (10.0.0.6)")
    now[0] += 10
    entry, is_news = known.add(session(2, link=Peer("10.0.0.6")), "host-7 (10.0.0.5)")
    assert not is_news and entry.tries == 2 and known.current() == (entry,)
    for number in range(5):
        known.add(session(2, bytes([number]), link=Peer("10.0.0.9")), "host-7 (10.0.0.5)")
    assert len(known.current()) == 3
    now[0] += module.SHOWN_SECONDS + 1
    assert known.current() == ()
    assert known.add(session(2, b"\4", link=Peer("10.0.0.9")), "host-7 (10.0.0.5)")[1]


def test_a_host_is_named_by_its_name_and_address() -> None:
    """An agent of an older version has no name to say."""
    hello = session(1).hello
    assert hello is not None
    assert place(hello, "10.0.0.5") == "host-7 (10.0.0.5)"
    assert place(msgspec.structs.replace(hello, host=""), "10.0.0.5") == "10.0.0.5"
