"""Configuration: where values come from, what is refused and how it is told, and that its page is true."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rtunnel import config
from rtunnel.config import Config, ConfigError, Flag, consistency, load, loading, preflight
from rtunnel.wire.messages import MAX_HELLO, Decoder, Enrol, Hello, encode
from support.effort import times

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


@pytest.fixture(autouse=True)
def _descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the units give, whatever this machine has."""
    monkeypatch.setattr(preflight, "descriptor_limit", lambda: 1048576)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "rtunnel.toml"
    path.write_text(text)
    return path


def fault(path: Path | None = None, environ: Mapping[str, str] | None = None, **overrides: object) -> str:
    """The text of the refusal; overrides are written section__key."""
    with pytest.raises(ConfigError) as caught:
        load(path, environ or {}, {key.replace("__", "."): value for key, value in overrides.items()})
    return str(caught.value)


def configured(tmp_path: Path, role: str, **more: object) -> Config:
    """A configuration with which the role could start."""
    for name in ("cluster.key", "gateway.key", "join.token", "broker.pem", "broker.key", "ca.pem"):
        file = tmp_path / name
        file.touch(mode=0o600)
    values: dict[str, object] = {}
    for section in config.role_sections(role):
        for key, name in (
            ("cluster_key", "cluster.key"),
            ("join_token", "join.token"),
            ("certificate", "broker.pem"),
            ("key", "gateway.key" if section == "gateway" else "broker.key"),
            ("ca", "ca.pem"),
        ):
            if f"{section}.{key}" in config.KEYS:
                values[f"{section}.{key}"] = str(tmp_path / name)
    if role == "agent":
        values |= {"agent.brokers": "vip:7000", "agent.exposes": "22"}
    if role == "authority":
        values["authority.directory"] = str(tmp_path)
    if role in ("broker", "gateway"):
        values["registry.url"] = "redis://127.0.0.1/0"
    return load(None, {}, values | {key.replace("__", "."): value for key, value in more.items()})


# --- where values come from -------------------------------------------------------------------------------------------


def test_nothing_given_is_the_defaults() -> None:
    """Without file, variables and flags every key has its default."""
    assert load(None, {}, {}) == Config()


def test_later_sources_win(tmp_path: Path) -> None:
    """Flags override variables, variables the file, the file the defaults; and each value knows its source."""
    path = write(tmp_path, '[broker]\nnode_id = "file"\nhost = "file"\nmax_sessions = 7\n')
    environ = {"RTUNNEL_BROKER_NODE_ID": "env", "RTUNNEL_BROKER_HOST": "env"}
    loaded = load(path, environ, {"broker.node_id": Flag("--node-id", "flag"), "broker.drain": None})
    assert (loaded.broker.node_id, loaded.broker.host, loaded.broker.max_sessions) == ("flag", "env", 7)
    assert loaded.source("broker.node_id") == "--node-id"
    assert loaded.source("broker.host") == "$RTUNNEL_BROKER_HOST"
    assert loaded.source("broker.max_sessions") == str(path)
    assert loaded.source("broker.drain") == "default"


def test_variables_are_read_as_the_type_of_their_key() -> None:
    """Numbers, lists, nested sections and empty strings work in variables."""
    environ = {
        "RTUNNEL_BROKER_OPEN_PORTS_RANGE": "30000-30999",
        "RTUNNEL_BROKER_OPEN_PORTS_ALLOW": "10.0.0.0/8, fd00::/8",
        "RTUNNEL_BROKER_MAX_SESSIONS": "12",
        "RTUNNEL_BROKER_DRAIN": "2.5",
        "RTUNNEL_BROKER_ADMIN": "",
        "RTUNNEL_AGENT_PUBLISH": "10.1.0.7:9100@30001,10.1.0.7:22",
        "RTUNNEL_AGENT_EXPOSES": "",
    }
    loaded = load(None, environ, {})
    assert loaded.broker.open_ports.range == "30000-30999"
    assert loaded.broker.open_ports.allow == ["10.0.0.0/8", "fd00::/8"]
    assert (loaded.broker.max_sessions, loaded.broker.drain, loaded.broker.admin) == (12, 2.5, "")
    assert [(entry.target, entry.port) for entry in loaded.agent.publish] == [
        ("10.1.0.7:9100", 30001),
        ("10.1.0.7:22", 0),
    ]
    assert loaded.agent.exposes == []


def test_repeated_flags_make_a_list() -> None:
    """A list flag takes repetition and commas."""
    assert load(None, {}, {"agent.exposes": ("22,80", "8000-8100")}).agent.exposes == ["22", "80", "8000-8100"]


def test_numbers_in_exposes() -> None:
    """`exposes = [9100]` means port 9100."""
    assert load(None, {}, {"agent.exposes": [9100]}).agent.exposes == ["9100"]


def test_relative_files_stand_beside_the_configuration(tmp_path: Path) -> None:
    """A relative file starts from the configuration file's folder; one of a variable from the working directory."""
    text = '[broker]\nkey = "pki/b.key"\ncertificate = "/etc/b.pem"\n[authority]\ndirectory = "pki"\n'
    path = write(tmp_path, text)
    loaded = load(path, {"RTUNNEL_BROKER_CLUSTER_KEY": "pki/c.key"}, {})
    assert loaded.broker.key == str(tmp_path / "pki/b.key")
    assert loaded.authority.directory == str(tmp_path / "pki")
    assert loaded.broker.certificate == "/etc/b.pem"
    assert loaded.broker.cluster_key == "pki/c.key"


def test_publish_tables(tmp_path: Path) -> None:
    """[[agent.publish]] tables are read whole."""
    path = write(tmp_path, '[[agent.publish]]\ntarget = "10.1.0.7:9100"\nport = 30001\nallow = ["10.0.0.0/8"]\n')
    (entry,) = load(path, {}, {}).agent.publish
    assert (entry.target, entry.port, entry.allow) == ("10.1.0.7:9100", 30001, ["10.0.0.0/8"])


def test_kubernetes_service_variables_are_ignored() -> None:
    """A Service named rtunnel-broker in the same namespace does not stop a broker from starting."""
    environ = {
        "RTUNNEL_BROKER_SERVICE_HOST": "10.96.0.7",
        "RTUNNEL_BROKER_SERVICE_PORT": "7000",
        "RTUNNEL_BROKER_SERVICE_PORT_LINKS": "7000",
        "RTUNNEL_BROKER_PORT": "tcp://10.96.0.7:7000",
        "RTUNNEL_BROKER_PORT_7000_TCP": "tcp://10.96.0.7:7000",
        "RTUNNEL_BROKER_PORT_7000_TCP_ADDR": "10.96.0.7",
        "RTUNNEL_GATEWAY_HEADLESS_PORT_1080_TCP_PROTO": "tcp",
    }
    assert load(None, environ, {}) == Config()


def test_other_variables_are_ignored() -> None:
    """RTUNNEL_CONFIG and variables of no section are none of our business."""
    assert load(None, {"RTUNNEL_CONFIG": "/x", "RTUNNEL_BENCH_CLIENTS": "9", "PATH": "/bin"}, {}) == Config()


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_unknown_keys_suggest_the_nearest(tmp_path: Path) -> None:
    """A mistyped key, section or variable is refused with what was probably meant, all of them at once."""
    path = write(tmp_path, '[broker]\nlistn = "0.0.0.0:1"\n[brokr]\nx = 1\n[agent]\nhedge_delay = 1\n')
    told = fault(path, {"RTUNNEL_BROKER_LISTN": "x"})
    assert f"{path}: broker.listn: is not a known key (did you mean broker.listen?)" in told
    assert f"{path}: brokr: is not a known key (did you mean broker?)" in told
    assert f"{path}: agent.hedge_delay: is not a known key (did you mean gateway.hedge_delay?)" in told
    assert "$RTUNNEL_BROKER_LISTN: is not a known key (did you mean $RTUNNEL_BROKER_LISTEN?)" in told
    assert "did you mean broker.listen?" in fault(broker__listn="x")


def test_a_broker_port_variable_by_hand_is_refused() -> None:
    """Only values that Kubernetes would set excuse a variable like RTUNNEL_BROKER_PORT."""
    assert "$RTUNNEL_BROKER_PORT: is not a known key" in fault(environ={"RTUNNEL_BROKER_PORT": "7000"})


@pytest.mark.parametrize(
    ("text", "where", "reason"),
    [
        ("[broker]\nlisten = \n", ":2:", "is not TOML"),
        ("[broker]\n\n[broker]\n", ":3:", "is not TOML"),
        ('x = "', ":1", "is not TOML"),
        ("x = " + "9" * 5000, "", "can't be parsed"),
        ("broker = 3", "broker", "is a section, not a value (write [broker])"),
    ],
)
def test_broken_files_name_the_place(tmp_path: Path, text: str, where: str, reason: str) -> None:
    """What is not TOML is refused with file, line and reason."""
    path = write(tmp_path, text)
    told = fault(path)
    assert told.startswith(str(path)) and where in told and reason in told


def test_files_that_cant_be_read(tmp_path: Path) -> None:
    """A missing file, a folder, binary and a huge file are refused by name."""
    assert fault(tmp_path / "none.toml") == f"{tmp_path}/none.toml: can't be read: No such file or directory"
    assert "Is a directory" in fault(tmp_path)
    binary = tmp_path / "binary"
    binary.write_bytes(b"a = 1\nb = '\xff'\n")
    assert fault(binary) == f"{binary}:2: is not UTF-8 text (save it as UTF-8)"
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate(config.MAX_FILE + 1)
    assert "is larger than 1 MiB (give the configuration file)" in fault(huge)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("broker.listen", "7000", "is not host:port"),
        ("broker.listen", "localhost:7000", "write 127.0.0.1:7000"),
        ("broker.listen", "fd00::1:7000", "in brackets"),
        ("broker.listen", "10.0.0.256:7000", "is not an IP address"),
        ("broker.listen", "10.0.0.1:70000", "is not a port"),
        ("broker.listen", "10.0.0.1:+1", "is not a port"),
        ("broker.listen", "10.0.0.1:٣", "is not a port"),
        ("broker.listen", "[10.0.0.1]:7000", "not an IPv6 address"),
        ("broker.advertise_ip", "0.0.0.0", "is not the address of one host"),
        ("broker.port_range", "20000", "is not a range"),
        ("broker.port_range", "30-20", "write 20-30"),
        ("broker.port_range", "0-20", "use 1..65535"),
        ("broker.port_range", "", "is not a range"),
        ("broker.security", "tsl", "did you mean 'tls'?"),
        ("broker.node_id", "a b", "has a space"),
        ("broker.node_id", "a\x1b[2J", "control character"),
        ("broker.node_id", "n" * 129, "use 1 to 128"),
        ("broker.node_id", "\u8a9e" * 86, "258 bytes long in UTF-8 (use at most 256"),
        ("broker.max_sessions", "many", "'many' is not a whole number"),
        ("broker.max_sessions", 0, "out of bounds"),
        ("broker.max_sessions", 10**400, "out of bounds"),
        ("broker.drain", "nan", "out of bounds"),
        ("broker.drain", "inf", "out of bounds"),
        ("broker.drain", -1, "out of bounds"),
        ("registry.heartbeat", 0, "out of bounds"),
        ("agent.redundancy", 9, "use 1..8"),
        ("agent.namespace", "", "use 1 to 128"),
        ("agent.namespace", "a/b", "slash"),
        ("agent.brokers", ["vip:0"], "port 0 can't be dialled"),
        ("agent.brokers", ["-vip:1"], "neither an IP address nor a host name"),
        ("agent.brokers", ["vip"], "is not host:port"),
        ("agent.addresses", ["10.1.0.7/32"], "is not an IP address"),
        ("agent.addresses", ["fe80::1%eth0"], "has a scope"),
        ("agent.addresses", ["224.0.0.1"], "is not the address of one host"),
        ("agent.addresses", [f"10.0.0.{n}" for n in range(65)], "at most 64"),
        ("agent.exposes", ["http"], "is not a port"),
        ("agent.exposes", ["90-80"], "write 80-90"),
        ("agent.exposes", ["0"], "is not a port"),
        ("agent.publish", ["10.1.0.7"], "is not host:port"),
        ("agent.publish", ["name:80"], "is not an IP address"),
        ("agent.publish", [{"target": "10.1.0.7:80", "port": 70000}], "port 70000"),
        (
            "agent.publish",
            [{"target": "10.1.0.7:80", "prot": 1}],
            "agent.publish[0].prot: is not a known key (did you mean port?)",
        ),
        ("agent.publish", [{}], "missing required field `target`"),
        ("broker.open_ports.allow", ["10.0.0.1/8"], "write 10.0.0.0/8"),
        ("broker.open_ports.allow", ["ten"], "is not a network"),
        ("registry.url", "http://x", "is not one of memory, redis"),
        ("registry.url", "redis:///0", "names no host"),
        ("registry.url", "redis://x:port/0", "is not a URL"),
        ("registry.url", "unix://", "names no socket"),
        ("registry.url", "redis+sentinel://h:1", "needs sentinels and a service"),
        ("log.level", "verbose", "is not one of debug, info, warning, error"),
        ("log.format", "jsn", "did you mean 'json'?"),
        ("log.level", 3, "expected `str`, got `int`"),
    ],
)
def test_bad_values_are_refused_with_a_reason(key: str, value: object, reason: str) -> None:
    """Each bad value is told with its source, its key and the reason."""
    with pytest.raises(ConfigError) as caught:
        load(None, {}, {key: Flag("--flag", value)})
    (problem,) = caught.value.problems
    assert problem.source == "--flag"
    assert problem.key.startswith(key)
    assert reason in str(problem)
    assert str(problem).isprintable()


@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-inf"])
@pytest.mark.parametrize("key", [key for key, leaf in config.KEYS.items() if leaf.type is float])
def test_numbers_are_finite(tmp_path: Path, key: str, value: str) -> None:
    section, _, name = key.rpartition(".")
    refused = fault(write(tmp_path, f"[{section}]\n{name} = {value}"))
    number = "nan" if "nan" in value else value
    assert re.search(rf"toml: {re.escape(key)}: {number} is out of bounds \(use \d\S*\.\.\d+\)$", refused)
    assert f"{key}: {number} is out of bounds" in fault(environ={config.KEYS[key].env: value})


def test_passwords_are_not_repeated() -> None:
    """The refusal of a registry URL never shows its password."""
    for url in (
        "redis://:hunter2@", "http://u:hunter2@h", "redis://:hunter2@h:x/0", "redis+sentinel://:hunter2@h:1",
        "redis://:hunter2/x@10.0.0.5:6379/0", "redis://:hunter2\uff03x@10.0.0.5:6379/0",
    ):  # fmt: skip
        assert "hunter2" not in fault(registry__url=url)


def test_types_in_a_file_are_strict(tmp_path: Path) -> None:
    """A number in quotes is not a number in a file, where it could have been written as one."""
    told = fault(write(tmp_path, '[broker]\nmax_sessions = "12"\nlisten = 7000\n'))
    assert "broker.max_sessions: expected `int`, got `str` (the default is 60000)" in told
    assert 'broker.listen: expected `str`, got `int` (the default is "0.0.0.0:7000")' in told


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"registry__ttl": 5}, "registry.ttl: 5 s is less than 2 heartbeats of 3 s: one late heartbeat loses tuples"),
        ({"registry__heartbeat": 8}, "override: registry.ttl: 8 s is less than 2 heartbeats"),
        ({"registry__quarantine": 7}, "registry.quarantine: 7 s is less than ttl"),
        ({"broker__port_range": "6000-8000"}, "6000-8000 overlaps broker.listen (7000)"),
        ({"broker__port_range": "7050-8000"}, "overlaps broker.admin (7070)"),
        ({"broker__admin": "0.0.0.0:7000"}, "broker.admin: 7000 overlaps broker.listen (7000)"),
        ({"gateway__listen": "0.0.0.0:7072"}, "overlaps gateway.listen"),
        (
            {"broker__open_ports__range": "29999-30001", "broker__open_ports__allow": "::/0"},
            "overlaps broker.port_range",
        ),
        (
            {"broker__open_ports__range": "30000-30001"},
            "broker.open_ports.allow: is not given, and open ports need it (name",
        ),
        (
            {"broker__open_ports__allow": "10.0.0.0/8"},
            "broker.open_ports.range: is not given, and open ports need it (give",
        ),
        (
            {"agent__publish": "10.1.0.7:80", "agent__addresses": "10.1.0.8"},
            "10.1.0.7 is not one of the agent's addresses",
        ),
    ],
)
def test_keys_that_contradict_each_other(overrides: dict[str, object], reason: str) -> None:
    """Checks over several keys name the key at fault, the other one and both values."""
    assert reason in fault(None, None, **overrides)


def much(networks: int) -> dict[str, object]:
    """An agent with as much of everything as there may be, each as long as it can be, and with so many networks."""
    addresses = [f"1111:2222:3333:4444:5555:6666:7777:{8000 + number}" for number in range(64)]
    publish = [
        {
            "target": f"[{address}]:{60000 + number}",
            "port": 50000,
            "allow": [f"{address}/128"] * max(0, min(64, networks - 64 * number)),
        }
        for number, address in enumerate(addresses)
    ]
    return {
        "agent.agent_id": "\U00010000" * 64,
        "agent.namespace": "\U00010000" * 64,
        "agent.addresses": addresses,
        "agent.exposes": [f"{10000 + 3 * number}-{10001 + 3 * number}" for number in range(256)],
        "agent.publish": publish,
    }


def test_what_an_agent_tells_brokers_fits() -> None:
    """64 addresses, 256 ports and 64 open ports fit into a Hello with the longest names. Networks that do not are
    refused here, and not by every broker."""
    agent, networks = load(None, {}, much(0)).agent, 0
    assert (len(agent.addresses), len(agent.exposes), len(agent.publish)) == (64, 256, 64)
    with pytest.raises(ConfigError) as caught:
        for networks in range(64 * 64):
            agent = load(None, {}, much(networks)).agent
    (problem,) = caught.value.problems
    assert problem.key == "agent.publish"
    assert re.search(r"Hello up to 32\d{3} bytes long, and brokers read at most 32768 \(give fewer", str(problem))
    hello = consistency.longest_hello(agent)
    frame = encode(hello)
    assert networks > 64 and MAX_HELLO - 64 < len(frame) - 4 <= MAX_HELLO
    decoder = Decoder[Hello | Enrol](Hello, Enrol, limit=MAX_HELLO)
    decoder.feed(frame)
    assert decoder.next() == hello


def test_what_does_not_contradict() -> None:
    """Equal ports on different addresses, random ports, and the least durations are allowed."""
    values = {
        "broker.listen": "10.0.0.1:7000",
        "broker.admin": "127.0.0.1:7000",
        "gateway.listen": "127.0.0.1:0",
        "gateway.admin": "127.0.0.1:0",
        "registry.ttl": 10,
        "registry.quarantine": 10,
    }
    assert load(None, {}, values).broker.admin == "127.0.0.1:7000"


_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates()
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=times(100), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(config.KEYS)), _values, st.booleans())
@example("broker.drain", 10**400, True)
@example("agent.publish", [{"target": "\ud800:1"}], True)
def test_any_value_is_taken_or_refused(key: str, value: Any, from_file: bool) -> None:
    """No value of any type, from a file or a flag, raises anything but ConfigError, and messages stay in one line."""
    table: dict[str, Any] = {}
    inner = table
    *parents, name = key.split(".")
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[name] = value
    try:
        if from_file:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loading, "_read_toml", lambda path: table)
                load(Path("/etc/x.toml"), {}, {})
        else:
            load(None, {}, {key: value})
    except ConfigError as error:
        assert all("\n" not in str(problem) for problem in error.problems)


@settings(max_examples=times(80), deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(config.KEYS)).map(lambda key: config.KEYS[key].env), st.text(), max_size=3)
)
def test_any_variable_is_taken_or_refused(environ: dict[str, str]) -> None:
    """No text in a variable raises anything but ConfigError."""
    try:
        load(None, environ, {})
    except ConfigError:
        pass


# --- helpers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.0.0.1:7000", "10.0.0.1", 7000),
        ("[FD00:0::1]:7000", "fd00::1", 7000),
        ("[::ffff:10.0.0.1]:1", "10.0.0.1", 1),
        ("VIP.example:0", "vip.example", 0),
        ("vip.example.:1", "vip.example.", 1),
    ],
)
def test_endpoints(text: str, host: str, port: int) -> None:
    """host:port is taken apart, addresses and names in their one spelling."""
    assert config.parse_endpoint(text) == (host, port)
    assert config.parse_endpoint(config.format_endpoint(host, port)) == (host, port)


def test_exposes_are_sorted_and_merged() -> None:
    """Overlapping and touching ranges become one."""
    assert config.parse_exposes(["9100", "80-90", "91", "85-88", "22"]) == ((22, 22), (80, 91), (9100, 9100))
    assert config.parse_exposes([]) == ()


def test_ranges() -> None:
    """A range has both ends included."""
    assert config.parse_range("20000-29999") == (20000, 29999)
    with pytest.raises(ValueError, match="is not a range"):
        config.parse_range("")


def by_ipaddress(text: str) -> str | None:
    """The one spelling as the standard library has it; None: no address."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return None if address.scope_id else str(address.ipv4_mapped or address)


WORDS = st.sampled_from(("0", "0000", "1", "a", "ff", "FFFF", "10000", "", "1.2.3.4", "01.2.3.4"))


@given(
    st.one_of(
        st.integers(0, 2**32 - 1).map(lambda n: str(ipaddress.IPv4Address(n))),
        st.integers(0, 2**128 - 1).map(lambda n: ipaddress.IPv6Address(n).exploded),
        st.integers(0, 2**40).map(lambda n: str(ipaddress.IPv6Address(n))),
        st.lists(WORDS, min_size=2, max_size=9).map(":".join),
        st.text("0123456789abcdef:.%x ", max_size=45),
    )
)
@example("::")
@example("::a01:7")
@example("::10.1.0.7")
@example("::ffff:10.1.0.7")
@example("0:0:0:0:0:fffe:a01:7")
@example("fe80::1%eth0")
@example("1.2.3.4\0")
def test_an_address_has_one_spelling(text: str) -> None:
    """The same as by `ipaddress`, which takes twenty times as long."""
    expected = by_ipaddress(text)
    if expected is None:
        with pytest.raises(ValueError, match=r"is not an IP address|has a scope"):
            config.canonical_ip(text)
    else:
        assert config.canonical_ip(text) == expected


def test_default_address_is_an_address() -> None:
    """The default address is one of this machine's, or there is no default route."""
    address = config.default_address()
    assert not address or config.canonical_ip(address) == address


def test_default_address_without_any_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a default route has none: 127.0.0.1 would be every machine's."""

    def unreachable(*_: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("socket.socket.connect", unreachable)
    assert config.default_address() == ""


# --- what a role needs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", config.ROLES)
def test_a_complete_configuration_starts(tmp_path: Path, role: str) -> None:
    """With everything given there is nothing to complain about, and nothing to warn of."""
    loaded = configured(tmp_path, role)
    config.check_role(loaded, role)
    assert config.warnings(loaded, role) == []


@pytest.mark.parametrize(
    ("role", "keys"),
    [
        ("broker", ["broker.cluster_key", "broker.ca", "broker.certificate", "broker.key"]),
        ("agent", ["agent.brokers", "agent.join_token", "agent.ca"]),
        ("gateway", ["gateway.key", "gateway.ca", "registry.url"]),
        ("authority", ["authority.directory"]),
        (
            "standalone",
            [
                "broker.cluster_key",
                "broker.ca",
                "broker.certificate",
                "broker.key",
                "gateway.key",
                "gateway.ca",
            ],
        ),
    ],
)
def test_roles_say_all_that_they_miss(role: str, keys: list[str]) -> None:
    """A role names every key that it needs, at once."""
    with pytest.raises(ConfigError) as caught:
        config.check_role(Config(), role)
    assert [problem.key for problem in caught.value.problems] == keys


def test_plain_needs_no_certificates(tmp_path: Path) -> None:
    """With security = plain certificates are neither needed nor looked at, and that is worth a warning."""
    loaded = configured(tmp_path, "broker", broker__security="plain", broker__certificate="/none", broker__key="")
    config.check_role(loaded, "broker")
    assert [problem.key for problem in config.warnings(loaded, "broker")] == ["broker.security"]


def test_files_must_be_there(tmp_path: Path) -> None:
    """A file that is missing, or a folder or a pipe in its place, is told with its key and source."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    loaded = configured(
        tmp_path,
        "broker",
        broker__key=Flag("--key", "/none"),
        broker__certificate=str(tmp_path),
        broker__cluster_key=str(fifo),
    )
    with pytest.raises(ConfigError) as caught:
        config.check_role(loaded, "broker")
    told = str(caught.value)
    assert "--key: broker.key: /none can't be read: No such file or directory" in told
    assert f"broker.certificate: {tmp_path} is not a file" in told
    assert f"broker.cluster_key: {fifo} is not a file" in told


def test_secrets_that_others_can_read_are_warned_of(tmp_path: Path) -> None:
    """A secret file of mode 0644 is a warning, a certificate of that mode is not."""
    loaded = configured(tmp_path, "broker")
    (tmp_path / "broker.key").chmod(0o644)
    (tmp_path / "broker.pem").chmod(0o644)
    (problem,) = config.warnings(loaded, "broker")
    assert problem.key == "broker.key" and "mode 0644" in problem.reason


def test_ranges_of_the_kernel_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port range inside ip_local_port_range is a warning, one outside is none."""
    ephemeral = tmp_path / "ip_local_port_range"
    ephemeral.write_text("29999\t60999\n")
    monkeypatch.setattr(preflight, "_EPHEMERAL", ephemeral)
    (problem,) = config.warnings(configured(tmp_path, "broker"), "broker")
    assert problem.key == "broker.port_range" and "29999-60999" in problem.reason
    ephemeral.write_text("30000\t60999\n")
    assert config.warnings(configured(tmp_path, "broker"), "broker") == []


def test_a_publish_target_of_the_default_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without addresses, a publish target must be the default address."""
    monkeypatch.setattr(preflight, "default_address", lambda: "10.1.0.7")
    config.check_role(configured(tmp_path, "agent", agent__publish="10.1.0.7:80"), "agent")
    with pytest.raises(ConfigError, match=r"agent\.publish\[0\]\.target: 203\.0\.113\.9 is not one of"):
        config.check_role(configured(tmp_path, "agent", agent__publish="203.0.113.9:80"), "agent")


def test_standalone_shares_ports(tmp_path: Path) -> None:
    """In one process broker and gateway must not claim the same port, nor disagree on what Dials look like."""
    loaded = configured(tmp_path, "standalone", gateway__listen="0.0.0.0:20001", gateway__dial_security="tls")
    with pytest.raises(ConfigError) as caught:
        config.check_role(loaded, "standalone")
    assert [problem.key for problem in caught.value.problems] == ["broker.port_range", "gateway.dial_security"]


def test_proofs_need_a_ca(tmp_path: Path) -> None:
    """Proofs are wanted by default; without a CA the way out is told, both ways. Without proofs there is a warning."""
    with pytest.raises(ConfigError) as caught:
        config.check_role(configured(tmp_path, "gateway", gateway__ca=""), "gateway")
    (problem,) = caught.value.problems
    assert problem.key == "gateway.ca" and "ca.pem" in problem.fix and 'proof = "off"' in problem.fix
    loaded = configured(tmp_path, "gateway", gateway__ca="", gateway__proof="off")
    config.check_role(loaded, "gateway")
    assert [problem.key for problem in config.warnings(loaded, "gateway")] == ["gateway.proof"]


def test_dials_over_tls_need_certificates(tmp_path: Path) -> None:
    """A gateway needs the CA, even without proofs; a broker needs its certificate, even for plain links."""
    with pytest.raises(
        ConfigError, match=r"gateway\.ca: is not given: the gateway checks brokers' certificates with it"
    ):
        loaded = configured(tmp_path, "gateway", gateway__ca="", gateway__proof="off", gateway__dial_security="tls")
        config.check_role(loaded, "gateway")
    loaded = configured(
        tmp_path,
        "broker",
        broker__security="plain",
        broker__dial_security="tls",
        broker__certificate="",
        broker__key="",
    )
    with pytest.raises(ConfigError) as caught:
        config.check_role(loaded, "broker")
    assert [problem.key for problem in caught.value.problems] == ["broker.certificate", "broker.key"]


def test_an_agents_certificate_has_a_key(tmp_path: Path) -> None:
    """One without the other is told."""
    with pytest.raises(ConfigError, match=r"agent\.key: is not given, and agent\.certificate is"):
        config.check_role(configured(tmp_path, "agent", agent__key=""), "agent")


def test_a_gateway_for_others_needs_rules(tmp_path: Path) -> None:
    """Listening beyond loopback without a policy is a warning; with one, or on loopback, there is none."""
    (tmp_path / "policy.toml").touch()
    for listen, policy, warned in (
        ("127.0.0.1:1080", "", False),
        ("[::1]:1080", "", False),
        ("0.0.0.0:1080", "", True),
        ("[fd00::1]:1080", "", True),
        ("0.0.0.0:1080", str(tmp_path / "policy.toml"), False),
    ):
        loaded = configured(tmp_path, "gateway", gateway__listen=listen, gateway__policy=policy)
        assert [problem.key for problem in config.warnings(loaded, "gateway")] == ["gateway.policy"] * warned


def test_no_auth_needs_users(tmp_path: Path) -> None:
    """It has no effect alone."""
    assert fault(gateway__no_auth="10.0.0.0/8").startswith("override: gateway.no_auth: has no effect without users")
    load(None, {}, {"gateway.no_auth": "10.0.0.0/8", "gateway.users": "users"})


def test_a_lonely_memory_registry(tmp_path: Path) -> None:
    """A broker of its own on the memory registry is a warning; an agent that exposes nothing too."""
    broker = configured(tmp_path, "broker", registry__url="memory://")
    assert [problem.key for problem in config.warnings(broker, "broker")] == ["registry.url"]
    agent = configured(tmp_path, "agent", agent__exposes="")
    assert [problem.key for problem in config.warnings(agent, "agent")] == ["agent.exposes"]


# --- the page ---------------------------------------------------------------------------------------------------------


def rows() -> dict[str, list[str]]:
    """The key rows of the page's tables: key -> cells."""
    found = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 5:
            found[cells[0].strip("`")] = cells
    return found


def test_the_page_has_every_key() -> None:
    """docs/configuration.md has exactly the keys of the structs, with their defaults, units, variables and meanings."""
    expected = {}
    for path, leaf in config.KEYS.items():
        default = json.dumps(leaf.default)
        expected[path] = [f"`{path}`", f"`{default}`", leaf.key.unit, f"`{leaf.env}`", leaf.key.help]
    assert rows() == expected


def test_the_page_has_the_publish_tables_keys() -> None:
    """The keys of [[agent.publish]] stand on the page with their defaults and meanings."""
    text = PAGE.read_text()
    hints = typing.get_type_hints(config.PublishConfig, include_extras=True)
    for field in msgspec.structs.fields(config.PublishConfig):
        default = field.default_factory() if callable(field.default_factory) else field.default
        shown = "must be given" if field.required else f"`{json.dumps(default)}`"
        key = typing.get_args(hints[field.name])[1]
        assert f"| `{field.name}` | {shown} | {key.unit} | {key.help} |" in text


def test_the_pages_examples_load() -> None:
    """Every TOML example of the page is a configuration that loads."""
    blocks = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) >= 5
    for block in blocks:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loading, "_read_toml", lambda path, block=block: tomllib.loads(block))
            load(Path("/etc/rtunnel.toml"), {}, {})


def test_counts_that_need_more_descriptors_than_there_are_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both figures, and both ways out."""
    monkeypatch.setattr(preflight, "descriptor_limit", lambda: 1024)
    for role, key in (("gateway", "max_clients"), ("broker", "max_sessions")):
        config = load(None, {}, {f"{role}.{key}": 1000})
        (note,) = [note for note in preflight.warnings(config, role) if note.key == f"{role}.{key}"]
        assert note.reason == "1000 needs 2256 descriptors, and this process may have 1024, enough for 384"
        assert note.fix == f"set LimitNOFILE=2256 (ulimit -Hn), or {key} = 384"
        config = load(None, {}, {f"{role}.{key}": 384})
        assert not [note for note in preflight.warnings(config, role) if note.key == f"{role}.{key}"]


def test_a_source_address_is_one_of_this_machine() -> None:
    keys: dict[str, object] = {"gateway.source_addresses": ["127.0.0.9", "192.0.2.1"]}
    with pytest.raises(ConfigError) as caught:
        preflight.check_role(load(None, {}, keys), "gateway")
    assert "gateway.source_addresses: 192.0.2.1 is not an address of this machine" in str(caught.value)
    assert "127.0.0.9" not in str(caught.value)
