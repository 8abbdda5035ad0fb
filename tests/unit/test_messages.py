"""Messages: an independent encoder (msgpack) on the other side, every limit attacked, any split of bytes."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from hypothesis import given, settings
from hypothesis import strategies as st

from rtunnel.trust import pki
from rtunnel.trust.identity import agent_uri, load_private_key
from rtunnel.trust.proof import sign
from rtunnel.trust.tls import certificate_der
from rtunnel.wire import messages
from rtunnel.wire.messages import (
    MAX_CERTIFICATE,
    MAX_LIST,
    MAX_MESSAGE,
    MAX_UNAUTHENTICATED,
    Accepted,
    AgentHop,
    Bye,
    Challenge,
    ControlMessage,
    Decoder,
    Dial,
    DialAnswer,
    DialBody,
    Dialling,
    Drain,
    Enrol,
    Enrolled,
    Follow,
    Hello,
    Hop,
    Message,
    MessageError,
    OpenPort,
    Proof,
    Publish,
    Refuse,
    Trust,
    Update,
    Welcome,
    decode_body,
    decode_hop,
    encode,
    encode_body,
    encode_hop,
)
from support.effort import times
from support.messages import decoder_of

NONCE = bytes(range(16))
MAC = bytes(range(32))
UNPROVEN = {"mac": b"", "certificate": b"", "exchange": b"", "signature": b"", "hop": b""}
ANY = ControlMessage | Follow | Dial | DialAnswer

#: Every message with every field given, as the peer would pack it, and as it should arrive.
EXAMPLES: list[tuple[dict[str, Any], Message]] = [
    (
        {
            "t": "hello", "version": 1, "agent_id": "host-7", "instance": NONCE, "namespace": "default",
            "addresses": ["10.1.0.7", "fd00::7"], "nonce": NONCE[::-1], "token_id": "ops",
            "exposes": ["22", "8000-8100"],
            "publish": [{"ip": "10.1.0.7", "target_port": 9100, "port": 30001, "allow": ["10.9.0.0/16"]}],
            "holds": ["b1"], "holds_hosts": ["h1"], "software": "other 2", "trust": 2**64 - 1, "host_id": b"h" * 8,
            "host": "pc-7", "time": 1_800_000_000_000, "interfaces": ["eth0", ""], "lost": ["10.1.0.8"],
            "certificate_end": 1_800_000_000, "complaint": "unknown ca",
            "start_window": 16384,
        },
        Hello(
            version=1, agent_id="host-7", instance=NONCE, namespace="default", addresses=["10.1.0.7", "fd00::7"],
            nonce=NONCE[::-1], token_id="ops", exposes=["22", "8000-8100"],
            publish=[Publish(ip="10.1.0.7", target_port=9100, port=30001, allow=["10.9.0.0/16"])],
            holds=["b1"], holds_hosts=["h1"], software="other 2", trust=2**64 - 1, host_id=b"h" * 8, host="pc-7",
            start_window=16384, time=1_800_000_000_000, interfaces=["eth0", ""], lost=["10.1.0.8"],
            certificate_end=1_800_000_000, complaint="unknown ca",
        ),
    ),
    (
        {
            "t": "enrol", "version": 1, "request": b"\x30\x00", "token_id": "ops", "mac": MAC,
            "certificate": b"\x30\x01", "signature": b"s",
        },
        Enrol(version=1, request=b"\x30\x00", token_id="ops", mac=MAC, certificate=b"\x30\x01", signature=b"s"),
    ),
    ({"t": "enrolled", "certificate": b"\x30\x02", "trust": b"t"}, Enrolled(certificate=b"\x30\x02", trust=b"t")),
    ({"t": "follow", "version": 1, "number": 2**64 - 1}, Follow(version=1, number=2**64 - 1)),
    ({"t": "trust", "signed": b"t"}, Trust(signed=b"t")),
    ({"t": "challenge", "nonce": NONCE, "mac": MAC, "version": 1}, Challenge(nonce=NONCE, mac=MAC)),
    ({"t": "proof", "mac": MAC}, Proof(mac=MAC)),
    (
        {
            "t": "welcome", "node": "b1", "host": "h1", "epoch": 2**64 - 1, "ip": "10.0.0.1", "port": 65535,
            "heartbeat": 2.5,
            "open_ports": [{"port": 30001, "ip": "10.1.0.7", "target_port": 9100}], "notices": ["no"], "software": "s",
            "start_window": 16384,
        },
        Welcome(
            node="b1", host="h1", epoch=2**64 - 1, ip="10.0.0.1", port=65535, heartbeat=2.5,
            open_ports=[OpenPort(port=30001, ip="10.1.0.7", target_port=9100)], notices=["no"], software="s",
            start_window=16384,
        ),
    ),
    (
        {"t": "refused", "code": "stale_epoch", "text": "über", **UNPROVEN, "mac": MAC, "time": 1_800_000_000_000},
        Refuse(code="stale_epoch", text="über", mac=MAC, time=1_800_000_000_000),
    ),
    (
        {"t": "update", "exposes": ["22"], "certificate": b"c", "signature": b"s", "addresses": ["10.1.0.7"]},
        Update(exposes=["22"], certificate=b"c", signature=b"s", addresses=["10.1.0.7"]),
    ),
    ({"t": "drain", "deadline": 30.0}, Drain(deadline=30.0)),
    ({"t": "bye", "reason": "so long"}, Bye(reason="so long")),
    ({"t": "dial", "body": b"\x80", "mac": MAC, "key": "g1"}, Dial(body=b"\x80", mac=MAC, key="g1")),
    (
        {
            "t": "hop", "node": "b1", "time": 1_800_000_000_000, "software": "s", "agent": "host-7",
            "peer": "10.9.0.4", "rtt": 0.25, "silence": 1.5, "streams": 3, "resending": 2, "sessions": 9, "silent": 1,
            "padding": b"pp",
        },
        Hop("b1", 1_800_000_000_000, "s", "host-7", "10.9.0.4", 0.25, 1.5, 3, 2, 9, 1, b"pp"),
    ),
    ({"t": "dialling"}, Dialling()),
    (
        {
            "t": "accepted", "mac": b"", "certificate": b"\x30\x03", "exchange": b"x" * 32, "signature": b"p",
            "hop": b"h",
        },
        Accepted(certificate=b"\x30\x03", exchange=b"x" * 32, signature=b"p", hop=b"h"),
    ),
]  # fmt: skip
IDS = [str(example["t"]) for example, _ in EXAMPLES]
#: What a message becomes when its optional keys are left out.
OPTIONAL: dict[str, dict[str, Any]] = {
    "hello": {
        "token_id": "", "exposes": [], "publish": [], "holds": [], "holds_hosts": [], "software": "", "trust": 0,
        "start_window": 262144,
        "host_id": b"", "host": "", "time": 0, "interfaces": [], "lost": [], "certificate_end": 0, "complaint": "",
    },
    "enrol": {"token_id": "", "mac": b"", "certificate": b"", "signature": b""},
    "enrolled": {"trust": b""},
    "follow": {"number": 0},
    "trust": {"signed": b""},
    "challenge": {"version": 1},
    "welcome": {"open_ports": [], "notices": [], "software": "", "start_window": 262144},
    "refused": {"text": "", **UNPROVEN, "time": 0},
    "update": {"certificate": b"", "signature": b"", "addresses": []},
    "bye": {"reason": ""},
    "dial": {"mac": b"", "key": ""},
    "hop": {
        "software": "", "agent": "", "peer": "", "rtt": 0.0, "silence": 0.0, "streams": 0, "resending": 0,
        "sessions": 0, "silent": 0, "padding": b"",
    },
    "accepted": UNPROVEN,
}  # fmt: skip
BODY: dict[str, Any] = {
    "version": 1, "namespace": "default", "ip": "10.1.0.7", "port": 9100, "node": "b1", "epoch": 4294967297,
    "nonce": NONCE, "time": 1_800_000_000_000, "who": "alice@10.2.0.3",
    "exchange": b"x" * 32, "pair": b"p" * 8, "trace": True,
}  # fmt: skip
#: What the agent says of a traced Dial.
HOP: dict[str, Any] = {
    "agent": "host-7", "time": 1_800_000_000_000, "software": "s", "way": "10.1.0.7", "source": "10.1.0.7",
    "interface": "eth0", "local": True, "connect": 0.25, "errno": "ECONNREFUSED",
    "doubt": "session 2: looking for another node",
}  # fmt: skip


def framed(body: bytes) -> bytes:
    """A body behind its length."""
    return struct.pack(">I", len(body)) + body


def packed(value: object) -> bytes:
    """A frame from the independent encoder."""
    return framed(msgpack.packb(value))


def decode(frame: bytes, expected: Any = ANY, limit: int = MAX_MESSAGE) -> Any:
    """The one message of a frame."""
    decoder = decoder_of(expected, limit)
    decoder.feed(frame)
    message = decoder.next()
    assert decoder.next() is None
    assert decoder.rest() == b""
    return message


def example_of(kind: str) -> dict[str, Any]:
    """A whole, good map of a type."""
    return dict(next(example for example, _ in EXAMPLES if example["t"] == kind))


def plain(message: Message) -> dict[str, Any]:
    """A message as a whole map: an encoded one may lack keys that have their defaults."""
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    return {"t": message.__struct_config__.tag, **msgspec.to_builtins(fields, builtin_types=(bytes,))}


def decoded_by_msgpack(frame: bytes) -> Any:
    """What the independent decoder finds in a frame."""
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    return msgpack.unpackb(frame[4:])


# Round trips.


def test_every_message_type_is_in_the_examples() -> None:
    """A new type without an example fails here."""
    assert {type(message) for _, message in EXAMPLES} == set(Message.__subclasses__())


@pytest.mark.parametrize(("example", "message"), EXAMPLES, ids=IDS)
def test_what_another_encoder_packs_is_understood(example: dict[str, Any], message: Message) -> None:
    """Every field arrives, whatever the order of the keys."""
    assert decode(packed(example)) == message
    assert decode(packed(dict(reversed(example.items())))) == message
    assert decode(packed(example), type(message)) == message


@pytest.mark.parametrize(("example", "message"), EXAMPLES, ids=IDS)
def test_another_decoder_understands_what_is_encoded(example: dict[str, Any], message: Message) -> None:
    """One map behind its length, strings and bytes kept apart; the keys of a Dial's answer that have their
    defaults may be left out.
    """
    found = decoded_by_msgpack(encode(message))
    left_out = {key: value for key, value in OPTIONAL.get(example["t"], {}).items() if key not in found}
    assert found | left_out == example
    assert not left_out or example["t"] in ("accepted", "refused")


@pytest.mark.parametrize("kind", OPTIONAL)
def test_optional_keys_have_defaults(kind: str) -> None:
    """A map with the required keys alone is the message with these values."""
    example = example_of(kind)
    for key in OPTIONAL[kind]:
        del example[key]
    assert plain(decode(packed(example))) == example | OPTIONAL[kind]


def test_a_dial_body_goes_round() -> None:
    """The bytes under the MAC are a map without a type."""
    body = DialBody(**BODY)
    assert msgpack.unpackb(encode_body(body)) == BODY
    assert decode_body(msgpack.packb(BODY)) == body
    optional = ("who", "exchange", "pair", "trace")
    least = decode_body(msgpack.packb({key: BODY[key] for key in BODY if key not in optional}))
    assert (least.who, least.exchange, least.pair, least.trace) == ("", b"", b"", False)


def test_the_report_of_an_agent_goes_round() -> None:
    """It is a map without a type; one that is no such map, or too long to send, harms nobody."""
    hop = AgentHop(**HOP)
    assert msgpack.unpackb(encode_hop(hop)) == HOP
    assert decode_hop(msgpack.packb(HOP)) == hop
    least = decode_hop(msgpack.packb({"agent": "host-7", "time": 1}))
    assert least == AgentHop("host-7", 1)
    long = "x" * 128
    assert encode_hop(AgentHop(long, 1, long, way=long, source=long, interface=long)) == b""
    for bad in (b"\xc1", b"\x80", msgpack.packb(HOP | {"way": "x" * 129}), msgpack.packb(HOP | {"local": 1})):
        with pytest.raises(MessageError, match="bad report of an agent"):
            decode_hop(bad)


def test_unknown_keys_are_ignored() -> None:
    """At every level and of every MessagePack type: later versions may add keys."""
    news = {
        "zz": None,
        "zy": [1, {"a": b"b"}],
        "zx": {"t": "bye"},
        "zw": msgpack.ExtType(4, b"12"),
        "zv": msgpack.Timestamp(1),
    }
    for example, message in EXAMPLES:
        assert decode(packed(news | example)) == message
        assert decode(packed(example | news)) == message
    hello = example_of("hello")
    hello["publish"] = [entry | news for entry in hello["publish"]]
    assert decode(packed(hello)) == EXAMPLES[0][1]
    assert decode_body(msgpack.packb(BODY | news)) == DialBody(**BODY)


def test_wide_encodings_of_the_same_values_are_understood() -> None:
    """map32, str32, uint64 and float32: an encoder need not choose the shortest form."""
    wide = (
        b"\xdf\0\0\0\2" + b"\xdb\0\0\0\1t" + b"\xd9\5drain" + b"\xda\0\x08deadline" + b"\xca" + struct.pack(">f", 2.5)
    )
    assert decode(framed(wide)) == Drain(deadline=2.5)
    assert decode(framed(b"\x82\xa1t\xa5drain\xa8deadline\xcf" + (7).to_bytes(8, "big"))) == Drain(deadline=7.0)


def test_the_exact_bytes_of_a_frame_are_handed_over() -> None:
    """A broker passes a Dial on as it came, and a MAC covers a Hello as it was sent: no byte is encoded anew."""
    frame = packed(example_of("dial") | {"future": 1})
    decoder = Decoder(Dial)
    decoder.feed(frame + b"raw")
    assert decoder.next_frame() == (Dial(body=b"\x80", mac=MAC, key="g1"), frame)
    assert decoder.rest() == b"raw"


# Faults.


def refused(frame: bytes, expected: Any = ANY, limit: int = MAX_MESSAGE) -> str:
    """The text of the MessageError that the frame must raise."""
    with pytest.raises(MessageError) as caught:
        decode(frame, expected, limit)
    return str(caught.value)


REQUIRED = [(kind, key) for kind in IDS for key in example_of(kind) if key not in OPTIONAL.get(kind, {}) and key != "t"]


@pytest.mark.parametrize(("kind", "key"), REQUIRED)
def test_a_missing_key_is_named(kind: str, key: str) -> None:
    """Each required key of each type."""
    example = example_of(kind)
    del example[key]
    assert f"missing required field `{key}`" in refused(packed(example))


@pytest.mark.parametrize("key", [key for key in BODY if key not in ("who", "exchange", "pair", "trace")])
def test_a_missing_key_of_a_dial_body_is_named(key: str) -> None:
    """Each required key of what a Dial asks for."""
    with pytest.raises(MessageError, match=f"missing required field `{key}`"):
        decode_body(msgpack.packb({k: v for k, v in BODY.items() if k != key}))


WRONG: dict[type, list[Any]] = {
    str: [1, b"bytes", None, ["a"], 1.5, True],
    bytes: [1, "x" * 32, None, [1]],
    int: ["1", 1.5, None, True, 2**64 - 1 + 0.0],
    float: ["1", None, b"", True],
    list: ["a", {}, 1, None],
    bool: [1, "true", None, 0.0],
}


@pytest.mark.parametrize("kind", IDS)
def test_a_value_of_a_wrong_type_is_refused(kind: str) -> None:
    """Nothing is converted: a string is no bytes, a float is no integer, a boolean is no number, null is nothing."""
    for key, value in example_of(kind).items():
        for wrong in WRONG[type(value)]:
            assert f"$.{key}" in refused(packed(example_of(kind) | {key: wrong})), (key, wrong)


def test_a_value_of_a_wrong_type_in_a_dial_body_is_refused() -> None:
    """The same for what a Dial asks for."""
    for key, value in BODY.items():
        for wrong in WRONG[type(value)]:
            with pytest.raises(MessageError, match=f"bad Dial body: .*{key}"):
                decode_body(msgpack.packb(BODY | {key: wrong}))


WORDS = ("", "x" * 129), ("x", "x" * 128)
ADDRESSES = ("a", "f" * 46), ("::", "f" * 45)
PORTS = (0, 65536, -1), (1, 65535)
NONCES = (b"", NONCE[1:], NONCE + b"x"), (NONCE,)
MACS = (b"", MAC[1:], MAC + b"x"), (MAC,)
IDENTIFIERS = ("x" * 129,), ("", "x" * 128, "ü" * 128)
WINDOWS = (4095, 2**18 + 1), (4096, 2**18)
UNSIGNED = (-1,), (0, 2**64 - 1)
MACS_OR_NONE = (MAC + b"x",), (b"", MAC)
CERTIFICATES = (b"x" * (MAX_CERTIFICATE + 1),), (b"", b"x" * MAX_CERTIFICATE)
EXCHANGES = (b"x" * 33,), (b"", b"x" * 32)
SIGNATURES = (b"x" * 129,), (b"", b"x" * 128)
LISTS = (b"x" * (MAX_LIST + 1),), (b"", b"x" * MAX_LIST)
TEXTS = ("x" * 513,), ("", "x" * 512, "ü" * 512)
OPEN = {"port": 1, "ip": "::", "target_port": 65535}
PUBLISH = {"ip": "10.1.0.7", "target_port": 9100, "port": 0, "allow": []}
#: type, key, values over a limit, values at it.
CAPS: list[tuple[str, str, tuple[Any, ...], tuple[Any, ...]]] = [
    ("hello", "agent_id", *WORDS),
    ("hello", "instance", *NONCES),
    ("hello", "namespace", *WORDS),
    ("hello", "addresses", ([], ["::"] * 65, ["x"], ["f" * 46]), (["::"] * 64,)),
    ("hello", "nonce", *NONCES),
    ("hello", "token_id", *IDENTIFIERS),
    ("hello", "exposes", (["22"] * 257, [""], ["x" * 129]), ([], ["22"] * 256)),
    ("hello", "publish", ([PUBLISH] * 65,), ([], [PUBLISH] * 64)),
    ("hello", "publish", ([PUBLISH | {"port": 65536}], [PUBLISH | {"port": -1}]), ([PUBLISH | {"port": 65535}],)),
    ("hello", "publish", ([PUBLISH | {"target_port": 0}],), ([PUBLISH | {"target_port": 1}],)),
    ("hello", "publish", ([PUBLISH | {"ip": "x"}],), ([PUBLISH | {"ip": "::"}],)),
    ("hello", "publish", ([PUBLISH | {"allow": ["::/0"] * 65}],), ([PUBLISH | {"allow": ["::/0"] * 64}],)),
    ("hello", "holds", (["n"] * 17, [""], ["n" * 129]), (["n" * 128] * 16,)),
    ("hello", "host_id", (NONCE + b"x",), (b"", NONCE)),
    ("hello", "host", *IDENTIFIERS),
    ("hello", "time", *UNSIGNED),
    ("hello", "interfaces", (["x"] * 65, ["x" * 17]), ([], [""], ["x" * 16] * 64)),
    ("hello", "lost", (["1.1.1.1"] * 17, ["1"]), ([], ["1.1.1.1"] * 16)),
    ("hello", "certificate_end", *UNSIGNED),
    ("hello", "complaint", *TEXTS),
    ("hello", "holds_hosts", (["h"] * 17, [""], ["h" * 129]), (["h" * 128] * 16,)),
    ("hello", "software", *TEXTS),
    ("hello", "trust", *UNSIGNED),
    ("hello", "start_window", *WINDOWS),
    ("welcome", "start_window", *WINDOWS),
    ("enrol", "request", *CERTIFICATES),
    ("enrol", "token_id", *IDENTIFIERS),
    ("enrol", "mac", *MACS_OR_NONE),
    ("enrol", "certificate", *CERTIFICATES),
    ("enrol", "signature", *SIGNATURES),
    ("enrolled", "certificate", *CERTIFICATES),
    ("enrolled", "trust", *LISTS),
    ("follow", "number", *UNSIGNED),
    ("trust", "signed", *LISTS),
    ("challenge", "nonce", *NONCES),
    ("challenge", "mac", *MACS),
    ("proof", "mac", *MACS),
    ("welcome", "node", *WORDS),
    ("welcome", "host", *WORDS),
    ("welcome", "epoch", *UNSIGNED),
    ("welcome", "ip", *ADDRESSES),
    ("welcome", "port", *PORTS),
    ("welcome", "open_ports", ([OPEN | {"port": 0}], [OPEN | {"ip": "x"}], [OPEN | {"target_port": 0}]), ([OPEN] * 9,)),
    ("welcome", "notices", (["x" * 513],), (["x" * 512] * 100,)),
    ("welcome", "software", *TEXTS),
    ("refused", "code", *WORDS),
    ("refused", "text", *TEXTS),
    ("refused", "time", (-1,), (0, 2**64 - 1)),
    ("update", "exposes", (["22"] * 257, [""]), ([], ["x" * 128] * 256)),
    ("update", "certificate", *CERTIFICATES),
    ("update", "signature", *SIGNATURES),
    ("update", "addresses", (["1.1.1.1"] * 65, ["1"]), ([], ["1.1.1.1"] * 64)),
    ("bye", "reason", *TEXTS),
    ("dial", "body", (b"x" * 1025,), (b"", b"x" * 1024)),
    ("dial", "mac", *MACS_OR_NONE),
    ("dial", "key", *IDENTIFIERS),
    *((answer, "mac", *MACS_OR_NONE) for answer in ("accepted", "refused")),
    *((answer, "certificate", *CERTIFICATES) for answer in ("accepted", "refused")),
    *((answer, "exchange", *EXCHANGES) for answer in ("accepted", "refused")),
    *((answer, "signature", *SIGNATURES) for answer in ("accepted", "refused")),
    *((answer, "hop", (b"h" * 513,), (b"", b"h" * 512)) for answer in ("accepted", "refused")),
    ("hop", "node", *WORDS),
    ("hop", "time", *UNSIGNED),
    ("hop", "software", *TEXTS),
    ("hop", "agent", *IDENTIFIERS),
    ("hop", "peer", *TEXTS),
    ("hop", "streams", *UNSIGNED),
    ("hop", "resending", *UNSIGNED),
    ("hop", "sessions", *UNSIGNED),
    ("hop", "silent", *UNSIGNED),
    ("hop", "padding", (b"p" * 4097,), (b"", b"p" * 4096)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "key", "over", "within"), CAPS, ids=[f"{c[0]}-{c[1]}-{i}" for i, c in enumerate(CAPS)]
)
def test_every_cap_of_a_field_holds(kind: str, key: str, over: tuple[Any, ...], within: tuple[Any, ...]) -> None:
    """One over the limit is refused and names the key; at the limit it is taken."""
    for value in over:
        assert f"$.{key}" in refused(packed(example_of(kind) | {key: value}))
    for value in within:
        message = decode(packed(example_of(kind) | {key: value}))
        assert decode(encode(message)) == message
        assert plain(message)[key] == value


def test_every_field_with_a_limit_is_attacked() -> None:
    """The table above has all keys that hold more than a plain number."""
    versions = {(kind, "version") for kind in ("hello", "enrol", "follow", "challenge")}
    plain = versions | {("welcome", "heartbeat"), ("drain", "deadline"), ("hop", "rtt"), ("hop", "silence")}
    every = {(kind, key) for kind in IDS for key in example_of(kind) if key != "t"}
    assert {(kind, key) for kind, key, _, _ in CAPS} == every - plain


#: The same of a Dial's body.
BODY_CAPS: list[tuple[str, tuple[Any, ...], tuple[Any, ...]]] = [
    ("namespace", *WORDS),
    ("ip", *ADDRESSES),
    ("port", *PORTS),
    ("node", *WORDS),
    ("epoch", *UNSIGNED),
    ("nonce", *NONCES),
    ("time", (), (0, -1, 2**63)),
    ("who", *TEXTS),
    ("exchange", *EXCHANGES),
    ("pair", (b"p" * 9,), (b"", b"p" * 8)),
    ("trace", (1, "yes"), (True, False)),
]


def test_every_field_of_a_dial_body_with_a_limit_is_attacked() -> None:
    """The table above has all fields but the version, which is compared."""
    assert [key for key, _, _ in BODY_CAPS] == [field for field in DialBody.__struct_fields__ if field != "version"]


@pytest.mark.parametrize(("key", "over", "within"), BODY_CAPS)
def test_every_cap_of_a_dial_body_holds(key: str, over: tuple[Any, ...], within: tuple[Any, ...]) -> None:
    """The same for what a Dial asks for."""
    for value in over:
        with pytest.raises(MessageError, match=rf"bad Dial body: .*\$\.{key}"):
            decode_body(msgpack.packb(BODY | {key: value}))
    for value in within:
        assert getattr(decode_body(msgpack.packb(BODY | {key: value})), key) == value


@pytest.mark.parametrize("limit", [MAX_UNAUTHENTICATED, MAX_MESSAGE])
def test_a_length_over_the_limit_is_refused_before_the_body_comes(limit: int) -> None:
    """Four bytes are enough to say no; a body of exactly the limit is taken."""
    for length in (limit + 1, 2**31, 2**32 - 1):
        assert (
            refused(struct.pack(">I", length), ANY, limit) == f"message of {length} bytes is over the limit of {limit}"
        )
    filler = limit - len(msgpack.packb({"t": "dialling", "z": ""})) - 2
    exact = packed({"t": "dialling", "z": "x" * filler})
    assert len(exact) == 4 + limit
    assert decode(exact, ANY, limit) == Dialling()


def test_the_limit_may_be_raised_in_between() -> None:
    """A peer that has proved itself may send longer messages from then on."""
    decoder = decoder_of(ANY)
    long = encode(Update(exposes=["x" * 128] * 256))
    decoder.feed(encode(Proof(mac=MAC)) + long)
    assert decoder.next() == Proof(mac=MAC)
    decoder.limit = MAX_MESSAGE
    assert decoder.next() == Update(exposes=["x" * 128] * 256)


def test_the_longest_lists_and_certificates_fit() -> None:
    """What each field may hold fits into a message together: with a certificate, a trust list too."""
    certificate, signature = b"c" * MAX_CERTIFICATE, b"s" * 128
    for message, limit in (
        (Accepted(mac=MAC, certificate=certificate, exchange=b"x" * 32, signature=signature), MAX_UNAUTHENTICATED),
        (Dial(body=b"b" * 1024, mac=MAC, key="k" * 128), MAX_UNAUTHENTICATED),
        (Enrolled(certificate=certificate, trust=b"t" * MAX_LIST), MAX_MESSAGE),
        (Trust(signed=b"t" * MAX_LIST), MAX_MESSAGE),
    ):
        assert decode(encode(message), ANY, limit) == message


def test_a_renewal_of_64_addresses_fits_before_authentication(tmp_path: Path) -> None:
    """The longest Enrol of all has a request and a certificate, each with all names and addresses of an agent."""
    namespace, agent_id = "n" * 128, "a" * 128
    addresses = [f"1111:2222:3333:4444:5555:6666:7777:{number:x}" for number in range(64)]
    pki.init(tmp_path / "ca")
    pki.issue_agent(tmp_path / "ca", "a1", agent_id=agent_id, namespace=namespace, addresses=addresses)
    key = load_private_key(tmp_path / "ca" / "a1.key")
    uri = x509.UniformResourceIdentifier(agent_uri(namespace, agent_id))
    alternatives = x509.SubjectAlternativeName([uri, *(x509.IPAddress(ip_address(address)) for address in addresses)])
    request = x509.CertificateSigningRequestBuilder(x509.Name([])).add_extension(alternatives, critical=False)
    message = Enrol(
        version=1,
        request=request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER),
        certificate=certificate_der(tmp_path / "ca" / "a1.pem"),
        signature=sign(key, b"", b"", b"any"),
    )
    assert decode(encode(message), Enrol, MAX_UNAUTHENTICATED) == message


@pytest.mark.parametrize("kind", ["nope", "", "HELLO", "Hello", "hello\0", "dialbody"])
def test_an_unknown_type_is_refused(kind: str) -> None:
    """Also where only one type could come."""
    assert "$.t" in refused(packed({"t": kind, "mac": MAC}))
    assert "$.t" in refused(packed({"t": kind, "mac": MAC}), Proof)


def test_a_type_that_does_not_belong_here_is_refused() -> None:
    """Each place takes the messages that may come there, and no others."""
    assert "'bye'" in refused(packed({"t": "bye"}), Hello)
    assert "'proof'" in refused(packed({"t": "proof", "mac": MAC}), Update | Bye)
    assert "'hello'" in refused(packed(example_of("hello")), DialAnswer)


@pytest.mark.parametrize("expected", [Proof, Proof | Bye, ANY], ids=["one", "two", "any"])
def test_a_map_without_a_type_is_refused(expected: Any) -> None:
    """Without `t` nobody knows what it is, also where one type alone could come."""
    assert "missing required field `t`" in refused(packed({"mac": MAC}), expected)
    assert "$.t" in refused(packed({"t": 1, "mac": MAC}), expected)
    assert "$.t" in refused(packed({"t": None, "mac": MAC}), expected)


@pytest.mark.parametrize("value", [0, 1, -1, 2**63, 2**64 - 1, -(2**63), 0.5, float("nan"), True, None, "", b"", []])
def test_nothing_is_no_message(value: object) -> None:
    """The type that makes decoding strict can't be had itself."""
    refused(packed({"t": "(nothing)", "never": value}), Proof)
    refused(packed({"t": "(nothing)"}), Proof)


@pytest.mark.parametrize("value", [None, 1, -1.5, True, "hello", b"hello", [], ["hello", 1], [{"t": "bye"}]])
def test_what_is_no_map_is_refused(value: object) -> None:
    """A frame's body is one map."""
    assert "bad message" in refused(packed(value))
    assert "bad message" in refused(packed(value), Bye)


BROKEN = {
    "nothing": b"",
    "a reserved byte": b"\xc1",
    "half a map": b"\x82\xa1t\xa3bye",
    "half a string": b"\x81\xa1t\xa3by",
    "a map of 2**32 - 1 keys": b"\xdf\xff\xff\xff\xff",
    "an array of 2**32 - 1": b"\x82\xa1t\xa6update\xa7exposes\xdd\xff\xff\xff\xff",
    "a string of 4 GiB": b"\x82\xa1t\xa3bye\xa6reason\xdb\xff\xff\xff\xff",
    "bytes of 4 GiB": b"\x82\xa1t\xa5proof\xa3mac\xc6\xff\xff\xff\xff",
    "bytes behind the map": b"\x81\xa1t\xa3bye\x00",
    "two maps": b"\x81\xa1t\xa3bye" * 2,
    "a number as key": b"\x82\xa1t\xa3bye\x01\x02",
    "null as key": b"\x82\xa1t\xa3bye\xc0\x02",
    "an array as key": b"\x82\xa1t\xa3bye\x91\x01\x02",
    "bad UTF-8 in a value": b"\x82\xa1t\xa3bye\xa6reason\xa2\xff\xfe",
    "bad UTF-8 in the type": b"\x81\xa1t\xa2\xff\xfe",
    "a surrogate": b"\x82\xa1t\xa3bye\xa6reason\xa3\xed\xa0\x80",
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=list(BROKEN))
@pytest.mark.parametrize("expected", [ANY, Bye, Update | Bye], ids=["any", "one", "two"])
def test_broken_messagepack_is_refused(body: bytes, expected: Any) -> None:
    """Each kind of damage is a MessageError with a reason, and nothing is allocated on a peer's word."""
    assert refused(framed(body), expected).startswith("bad message: ")


@pytest.mark.parametrize("opener", [b"\x91", b"\x81\xa1x", b"\x81", b"\xdd\0\0\0\1", b"\xdf\0\0\0\1\xa1x"])
@pytest.mark.parametrize("depth", [900, 1100, 20_000])
def test_deep_nesting_does_no_harm(opener: bytes, depth: int) -> None:
    """Garbage nested thousands deep, as the message or under an unknown key, is refused or ignored, never a crash."""
    limit = 1 << 20
    nest = opener * depth + b"\xc0"
    for body in (nest, b"\x82\xa1t\xa3bye\xa1z" + nest, b"\x82\xa1t\xa3bye\xa6reason" + nest):
        decoder = decoder_of(ANY, limit)
        decoder.feed(framed(body))
        try:
            assert decoder.next() == Bye()
            assert body[8:9] == b"z"
            assert depth < 20_000, "CPython 3.11 stops at 1000, newer ones at some thousands"
        except MessageError as error:
            assert str(error).startswith("bad message: ")


def test_a_deep_dial_body_does_no_harm() -> None:
    """The inner map has the same protection."""
    with pytest.raises(MessageError, match="bad Dial body"):
        decode_body(b"\x81\xa1z" + b"\x91" * 1000 + b"\xc0")


# Versions.


def test_another_version_of_another_shape_is_named() -> None:
    """A Hello of a later protocol may lack what ours needs: the fault names both versions."""
    note = "(the peer speaks version 2, this end 1)"
    assert refused(packed({"t": "hello", "version": 2}), Hello).endswith(note)
    assert refused(packed({"t": "hello/2", "version": 2, "x": 1}), Hello).endswith(note)


def test_another_version_of_the_same_shape_is_left_to_the_caller() -> None:
    """What can be decoded is handed over, with its version."""
    assert decode(packed(example_of("hello") | {"version": 2})).version == 2
    assert decode_body(msgpack.packb(BODY | {"version": 2})).version == 2


@pytest.mark.parametrize("body", [{"t": "hello", "version": 1}, {"t": "hello", "version": "2"}, {"version": 2}, [2]])
def test_no_version_is_blamed_without_reason(body: object) -> None:
    """The same version, or none that can be read, is no explanation."""
    assert "speaks version" not in refused(packed(body), Hello)


# The stream of bytes.


def take_all(pieces: Iterable[bytes]) -> tuple[list[Any], bytes, int]:
    """The messages in these pieces, the rest, and the most that was held between two feeds."""
    decoder = decoder_of(ANY, MAX_MESSAGE)
    found: list[Any] = []
    most = 0
    for piece in pieces:
        decoder.feed(piece)
        while (message := decoder.next()) is not None:
            found.append(message)
        most = max(most, len(decoder._buffer))
    return found, decoder.rest(), most


STREAM = b"".join(packed(example) for example, _ in EXAMPLES) + b"\0\0"


@pytest.mark.parametrize("size", [1, 3, 4, 5, 64, len(STREAM)])
def test_any_split_gives_the_same_messages(size: int) -> None:
    """Byte by byte or all at once; what follows the last whole message is the rest."""
    pieces = [STREAM[i : i + size] for i in range(0, len(STREAM), size)]
    assert take_all(pieces)[:2] == ([message for _, message in EXAMPLES], b"\0\0")


@settings(deadline=None)
@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_any_random_split_gives_the_same_messages(cuts: list[int]) -> None:
    """The same for splits that hypothesis likes."""
    edges = sorted({0, len(STREAM), *cuts})
    assert take_all(STREAM[a:b] for a, b in pairwise(edges))[:2] == ([message for _, message in EXAMPLES], b"\0\0")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_can_be_fed(kind: Any) -> None:
    """The link hands out slices of its read buffer: they are copied."""
    buffer = bytearray(encode(Bye(reason="x")))
    decoder = Decoder(Bye)
    decoder.feed(kind(buffer))
    buffer[:] = bytes(len(buffer))
    assert decoder.next() == Bye(reason="x")


def test_a_truncated_frame_is_waited_for() -> None:
    """No prefix of a good frame is a message or a fault."""
    frame = packed(example_of("hello"))
    for size in range(len(frame)):
        decoder = Decoder(Hello)
        decoder.feed(frame[:size])
        assert decoder.next() is None
        decoder.feed(frame[size:])
        assert decoder.next() == EXAMPLES[0][1]


def test_rest_hands_over_the_raw_stream_once() -> None:
    """What follows the last message belongs to somebody else, even when it looks like a message."""
    decoder = Decoder(Dial)
    decoder.feed(packed(example_of("dial")) + b"\xff\xff\xff\xffGET /")
    assert decoder.next() is not None
    assert decoder.rest() == b"\xff\xff\xff\xffGET /"
    assert decoder.rest() == b""


def test_expectations_change_between_messages_of_one_read() -> None:
    """The type of the second message is checked by what is expected when it is taken."""
    decoder = Decoder[Hello | Proof](Hello)
    decoder.feed(packed(example_of("hello")) + packed(example_of("proof")))
    assert isinstance(decoder.next(), Hello)
    decoder.expect(Proof)
    assert decoder.next() == Proof(mac=MAC)


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=3000), max_size=12), st.sampled_from((0, 64, MAX_UNAUTHENTICATED)))
def test_nothing_is_held_beyond_one_frame(pieces: list[bytes], limit: int) -> None:
    """Who takes messages after each feed holds less than one frame of the limit; in a feed, that and the piece."""
    decoder = decoder_of(ANY, limit)
    try:
        for piece in pieces:
            decoder.feed(piece)
            assert len(decoder._buffer) <= limit + 3 + len(piece)
            while decoder.next() is not None:
                pass
            assert len(decoder._buffer) <= limit + 3
    except MessageError:
        pass


def test_a_slow_long_message_is_held_up_to_the_limit() -> None:
    """The worst peer: a frame of the whole limit, all but its last byte."""
    most_of_it = framed(b"\xc0" * MAX_MESSAGE)[:-1]
    found, rest, most = take_all(most_of_it[i : i + 100] for i in range(0, len(most_of_it), 100))
    assert found == []
    assert rest == most_of_it
    assert most == MAX_MESSAGE + 3


# Anything at all.

JSONISH = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(),
        st.text(max_size=20), st.binary(max_size=40),
        st.sampled_from((NONCE, MAC, "default", "10.1.0.7", 1, 9100)),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=times(100), deadline=None)
@given(st.binary(max_size=200), st.sampled_from((ANY, Hello, Dial, DialAnswer)))
def test_arbitrary_bytes_raise_only_a_message_error(noise: bytes, expected: Any) -> None:
    """As a stream, as one frame's body, and as a Dial's body."""
    for feed in (noise, framed(noise)):
        decoder = decoder_of(expected)
        decoder.feed(feed)
        try:
            while decoder.next() is not None:
                pass
        except MessageError as error:
            assert str(error)
    try:
        decode_body(noise)
    except MessageError as error:
        assert str(error)


@settings(max_examples=times(100), deadline=None)
@given(st.data())
def test_arbitrary_values_give_a_message_or_an_error(data: st.DataObject) -> None:
    """Good maps with some keys replaced by anything: what is taken can be encoded and taken again, unchanged."""
    example, _ = data.draw(st.sampled_from(EXAMPLES))
    keys = data.draw(st.lists(st.sampled_from([*example, "other"]), max_size=3))
    frame = packed(example | {key: data.draw(JSONISH) for key in keys})
    try:
        message = decode(frame)
    except MessageError:
        return
    again = decode(encode(message))
    assert again == message or any(isinstance(v, float) and math.isnan(v) for v in _values(message))


def _values(message: Message) -> list[Any]:
    return [getattr(message, name) for name in message.__struct_fields__]


def test_the_protocol_has_one_version() -> None:
    """ALPN and the version in messages agree."""
    assert (messages.ALPN, messages.VERSION) == ("rtunnel/1", 1)


@pytest.mark.parametrize("word", ["x", "\u00e9", "\u20ac", "\U0001f600"])
def test_who_is_cut_where_a_dials_body_would_be_too_long(word: str) -> None:
    """Long names leave little room for `who`: it is cut between two characters, and everything else stays."""
    body = messages.DialBody(
        version=1, namespace=word * 100, ip="10.1.0.7", port=1, node="b1", epoch=1, nonce=bytes(16), time=1,
        who="gateway:" + word * 500,
    )  # fmt: skip
    raw = messages.encode_body(body)
    found = messages.decode_body(raw)
    assert len(raw) <= messages.MAX_BODY
    assert body.who.startswith(found.who) and found.who.startswith("gateway:")
    assert msgspec.structs.replace(found, who=body.who) == body
    if word != "x":
        assert len(raw) > messages.MAX_BODY - 8
