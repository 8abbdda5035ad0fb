"""docs/wire.md says what the code does: its tables, numbers and test vectors are compared, or computed anew."""

from __future__ import annotations

import hashlib
import hmac
import importlib
import json
import re
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from rtunnel.config import Config
from rtunnel.relay import link
from rtunnel.trust import certificates, identity
from rtunnel.trust import proof as proofs
from rtunnel.trust.keys import AGENT_LABEL, BROKER_LABEL, GATEWAY_LABEL, DialKeys, gateway_key, token_mac
from rtunnel.wire import messages
from rtunnel.wire.messages import Dial, Hello, Message, Proof, decode_body
from rtunnel.wire.refusal import Refusal
from rtunnel.wire.yamux import Fault
from rtunnel_agent import agent
from rtunnel_agent import identity as credentials
from support.messages import decoder_of

TEXT = (Path(__file__).parents[2] / "docs" / "wire.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """What stands under a heading, up to the next one."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found, f"docs/wire.md has no section {title!r}"
    return found[1]


def tables(text: str) -> list[list[list[str]]]:
    """Each table's rows of cells, without its head."""
    found: list[list[list[str]]] = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        found.append([[cell.strip() for cell in row] for row in rows[2:]])
    return found


def vectors() -> dict[str, bytes]:
    """All named values of the blocks of the kind `vector`."""
    found: dict[str, bytes] = {}
    for block in re.findall(r"^```vector\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL):
        for name, digits in re.findall(r"^(\w[\w ]*):\n((?:  [0-9a-f ]+\n)+)", block, re.MULTILINE):
            assert name not in found
            found[name] = bytes.fromhex("".join(digits.split()))
    return found


VECTORS = vectors()

# The join token.


def proof(label: bytes, binding: bytes) -> bytes:
    """The MAC as the page describes it, without the code under test."""
    text = b""
    for part in (label, VECTORS["hello frame"], VECTORS["nonce"], binding):
        text += len(part).to_bytes(4, "big") + part
    return hmac.new(VECTORS["secret"], text, hashlib.sha256).digest()


@pytest.mark.parametrize("end", ["broker", "agent"])
@pytest.mark.parametrize("plain", [False, True], ids=["tls", "plain"])
def test_the_example_of_a_join_proof_is_right(end: str, plain: bool) -> None:
    """The page's recipe, the page's result and the code agree, on TLS and on plain links."""
    label = f"rtunnel {end} 1"
    assert f"`{label}`" in section("Proof of the join token")
    binding = b"" if plain else VECTORS["binding"]
    expected = VECTORS[f"{end} mac on a plain link" if plain else f"{end} mac"]
    assert proof(label.encode(), binding) == expected
    frame, nonce = VECTORS["hello frame"], VECTORS["nonce"]
    assert token_mac(VECTORS["secret"], label.encode(), frame, nonce, binding) == expected


def test_labels_of_the_join_token_are_those_of_the_page() -> None:
    assert (BROKER_LABEL, AGENT_LABEL) == (b"rtunnel broker 1", b"rtunnel agent 1")


def test_the_binding_is_the_certificates_hash() -> None:
    """SHA-256 over the DER."""
    assert hashlib.sha256(VECTORS["certificate"]).digest() == VECTORS["binding"]


def one(frame: bytes, expected: Any) -> Any:
    """The one message of a frame."""
    decoder = decoder_of(expected)
    decoder.feed(frame)
    message = decoder.next()
    assert message is not None
    assert decoder.rest() == b""
    return message


def test_the_hello_of_the_example_says_what_the_page_says() -> None:
    """The frame decodes, with ours and with an independent decoder, to the words below it."""
    frame = VECTORS["hello frame"]
    hello = one(frame, Hello)
    assert hello == Hello(
        version=1,
        agent_id="host-7",
        instance=bytes(range(16)),
        namespace="default",
        addresses=["10.1.0.7"],
        nonce=bytes(range(16, 32)),
        token_id="example",
        exposes=["9100"],
    )
    assert msgpack.unpackb(frame[4:])["t"] == "hello"
    for word in (hello.agent_id, hello.namespace, *hello.addresses, hello.token_id, *hello.exposes):
        assert f"`{word}`" in section("Proof of the join token")
    assert one(VECTORS["proof frame"], Proof) == Proof(mac=VECTORS["agent mac"])


def test_the_example_of_a_dial_is_right() -> None:
    """The gateway's key from the cluster's, the MAC over the body's bytes, and what is asked for, as the page says."""
    cluster, body, mac = VECTORS["cluster key"], VECTORS["dial body"], VECTORS["dial mac"]
    dial = one(VECTORS["dial frame"], Dial)
    assert dial == Dial(body=body, mac=mac, key=dial.key)
    assert f"`{dial.key}`" in section("dial body") and '"rtunnel gateway 1" 00 <key id>' in section("dial body")
    derived = hmac.new(cluster, b"rtunnel gateway 1\0" + dial.key.encode(), hashlib.sha256).digest()
    assert derived == VECTORS["gateway key"] == gateway_key(cluster, dial.key).secret
    assert GATEWAY_LABEL == b"rtunnel gateway 1\0"
    assert hmac.new(derived, body, hashlib.sha256).digest() == mac
    assert DialKeys([cluster]).verify(dial.key, body, mac)
    asked = decode_body(body)
    assert (asked.version, asked.namespace, asked.ip, asked.port) == (1, "default", "10.1.0.7", 9100)
    assert (asked.node, asked.epoch, asked.time) == ("b1", 2**32 + 1, 1_800_000_000_000)
    assert asked.nonce == bytes(range(16))
    assert asked.who == "alice@10.9.0.4"
    assert msgpack.unpackb(body)["who"] == asked.who


# Enrolment and trust lists.


def test_the_example_of_an_enrolment_is_right() -> None:
    """The MAC under the page's secret over its stand-in of a request; and the labels."""
    text = b"".join(len(part).to_bytes(4, "big") + part for part in (b"rtunnel enrol 1", VECTORS["certificate"]))
    assert hmac.new(VECTORS["secret"], text, hashlib.sha256).digest() == VECTORS["enrol mac"]
    assert token_mac(VECTORS["secret"], certificates.ENROL_LABEL, VECTORS["certificate"]) == VECTORS["enrol mac"]
    for label in (certificates.ENROL_LABEL, certificates.RENEW_LABEL):
        assert f"`{label.rstrip(bytes(1)).decode()}`" in section("Enrolment")
    assert f"`{certificates.AUTHORITY_NAME}`" in section("The authority")
    assert "`rtunnel:agent/<namespace>/<agent_id>`" in section("Enrolment")
    assert identity.agent_uri("blue", "a/b") == "rtunnel:agent/blue/a%2Fb"


def test_the_example_of_a_trust_list_is_right() -> None:
    """It is taken by who has the CA, says what the page says, and an independent decoder and check agree."""
    ca = x509.load_der_x509_certificate(VECTORS["ca certificate"])
    trust_store = identity.TrustStore(certificates.pem(ca))
    assert trust_store.take(VECTORS["trust list"])
    assert (trust_store.number, trust_store.generation, trust_store.pem) == (
        1800000000,
        1800000000,
        certificates.pem(ca).decode(),
    )
    assert trust_store.revoked == {"agent/default/host-7": 1799999990}
    listed = msgpack.unpackb(VECTORS["trust list"])
    (signature,) = listed["signatures"]
    assert signature["signer"] == hashlib.sha256(VECTORS["ca certificate"]).digest()
    key = ca.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    key.verify(signature["value"], b"rtunnel trust list 1\0" + listed["body"], ec.ECDSA(hashes.SHA256()))
    body = msgpack.unpackb(listed["body"])
    names = [[row[0].strip("`") for row in table] for table in tables(section("Trust lists"))]
    assert names == [list(listed), list(body)]
    for word in (str(trust_store.number), "1799999990", "`agent/default/host-7`", "`rtunnel trust list 1`"):
        assert word in section("Trust lists")


def test_the_example_of_a_proof_is_right() -> None:
    """The signature is good for the label and the body of the example, with the code and without it."""
    body, signature, exchange = VECTORS["dial body"], VECTORS["signature"], VECTORS["agent exchange"]
    key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), VECTORS["agent public key"])
    key.verify(signature, b"rtunnel accepted 1\0" + exchange + body, ec.ECDSA(hashes.SHA256()))
    assert proofs.is_signed(key, proofs.ACCEPTED, exchange, body, signature)
    assert not proofs.is_signed(key, proofs.ACCEPTED, exchange, body + b"x", signature)


def test_the_example_of_a_pair_is_right() -> None:
    """From the two secrets to the MAC, step by step as the page has it, and with the code."""
    gateway, agent = (
        X25519PrivateKey.from_private_bytes(VECTORS[f"{end} exchange secret"]) for end in ("gateway", "agent")
    )
    gateways, agents = gateway.public_key().public_bytes_raw(), agent.public_key().public_bytes_raw()
    body, certificate = VECTORS["dial body"], VECTORS["certificate"]
    assert agents == VECTORS["agent exchange"] and gateways == decode_body(body).exchange
    shared = gateway.exchange(agent.public_key())
    assert shared == VECTORS["shared secret"]
    text = b"rtunnel pair 1\0" + gateways + agents + hashlib.sha256(certificate).digest()
    key = hmac.new(shared, text, hashlib.sha256).digest()
    assert key == VECTORS["pair key"]
    assert hashlib.sha256(b"rtunnel pair 1\0" + key).digest()[:8] == VECTORS["pair id"] == decode_body(body).pair
    mac = hmac.new(key, b"rtunnel accepted 1\0" + body, hashlib.sha256).digest()
    assert mac == VECTORS["accepted mac"]
    pair = proofs.PairKey(shared, gateways, agents, certificate)
    assert pair.id == VECTORS["pair id"] and pair.is_proof(proofs.ACCEPTED, body, mac)
    for label in (proofs.ACCEPTED, proofs.REFUSED, proofs.PAIR_LABEL):
        assert f'"{label.rstrip(bytes(1)).decode()}" 00' in section("Proofs")
    refused = proofs.answer_bytes(messages.Refuse(code="not_exposed", text="no"))
    assert refused == b"rtunnel refused 1\0not_exposed\0no\0"
    assert proofs.answer_bytes(messages.Accepted(hop=b"seen")) == b"rtunnel accepted 1\0\0\4seen"
    assert proofs.answer_bytes(messages.Refuse("a", "b", hop=b"h")) == b"rtunnel refused 1\0a\0b\0\0\1h"


# The fields of messages.

PARTS = {
    "publish": messages.Publish,
    "open_port": messages.OpenPort,
    "dial body": messages.DialBody,
    "agent hop": messages.AgentHop,
}
MESSAGES = {str(kind.__struct_config__.tag): kind for kind in Message.__subclasses__()}


def bounds(low: float | None, high: float | None) -> str:
    """How the page writes the limits of a type."""
    if high is None:
        return "" if low is None else f" >= {low}"
    low = low or 0
    return f" {low}" if low == high else f" {low}..{high}"


def spelled(kind: Any) -> str:
    """How the page writes a type."""
    if isinstance(kind, msgspec.inspect.StrType):
        return "str" + bounds(kind.min_length, kind.max_length)
    if isinstance(kind, msgspec.inspect.BytesType):
        return "bin" + bounds(kind.min_length, kind.max_length)
    if isinstance(kind, msgspec.inspect.BoolType):
        return "bool"
    if isinstance(kind, msgspec.inspect.IntType):
        return "int" + (f" {kind.ge}..{kind.le}" if kind.le is not None else bounds(kind.ge, None))
    if isinstance(kind, msgspec.inspect.FloatType):
        return "float" + (f" {kind.ge}..{kind.le}" if kind.le is not None else bounds(kind.ge, None))
    if isinstance(kind, msgspec.inspect.ListType):
        size = "" if kind.max_length is None else bounds(kind.min_length, kind.max_length)
        return f"array{size} of {spelled(kind.item_type)}"
    if isinstance(kind, msgspec.inspect.StructType):
        return next(name for name, part in PARTS.items() if part is kind.cls)
    assert isinstance(kind, msgspec.inspect.UnionType), kind
    strings = [part for part in kind.types if isinstance(part, msgspec.inspect.StrType)]
    assert len(strings) == len(kind.types)
    low, high = (f([getattr(s, n) for s in strings]) for f, n in ((min, "min_length"), (max, "max_length")))
    return "str" + bounds(low, high)


def default(field: msgspec.inspect.Field) -> str:
    """How the page writes a default."""
    if field.required:
        return ""
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    return json.dumps(value.decode() if isinstance(value, bytes) else value)


@pytest.mark.parametrize("name", [*MESSAGES, *PARTS])
def test_every_field_of_every_message_is_on_the_page(name: str) -> None:
    """Keys in order, with their types, limits and defaults; a meaning is for people."""
    info = msgspec.inspect.type_info((MESSAGES | PARTS)[name])
    assert isinstance(info, msgspec.inspect.StructType)
    expected = [[f"`{field.encode_name}`", spelled(field.type), default(field)] for field in info.fields]
    found = tables(section(name))
    assert [row[:3] for row in (found[0] if found else [])] == expected


# The rest.


def refusal_rows() -> list[str]:
    """The table of refusal codes, as it must stand on the page."""
    return [
        f"| `{code}` | 0x{code.reply.socks:02x} | {code.reply.http} | {code.reply.proxy_status} "
        f"| {code.reply.next.value} | {code.reply.text} |"
        for code in Refusal
    ]


def test_the_refusal_codes_are_those_of_the_enum() -> None:
    """The same rows in the same order; the page is wrong as soon as a code changes."""
    found = [line for line in section("Refusal codes").splitlines() if line.startswith("| `")]
    assert found == refusal_rows()


def test_every_refusal_word_on_the_page_exists() -> None:
    """The tables of checks name no code that is not there."""
    words = {code.value for code in Refusal}
    for title in ("dial body", "accepted", "hello", "publish", "proof", "Enrolment"):
        for table in tables(section(title)):
            for row in table:
                if len(row) == 2:
                    assert set(re.findall(r"`(\w+)`", row[1])) <= words, row
    named = set(re.findall(r"\(`(\w+)`", section("publish")))
    assert {"version", "bad_token", "draining", "duplicate_node"} <= named <= words


def test_the_faults_are_those_of_the_enum() -> None:
    """Every illegal frame of yamux is on the page."""
    found = [row[0] for table in tables(section("yamux")) for row in table if row[0].startswith("`")]
    assert found == [f"`{fault}`" for fault in Fault]


UNITS = {"": 1, "bytes": 1, "KiB": 1024, "MiB": 1024**2, "s": 1, "ms": 0.001}


def value_of(name: str) -> float:
    """A constant of a module, or the default of a key of the configuration."""
    holder, _, last = name.rpartition(".")
    if holder in ("broker", "agent", "gateway"):
        return float(getattr(getattr(Config(), holder), last))
    return float(getattr(importlib.import_module(holder), last))


@pytest.mark.parametrize("row", tables(section("Limits and timeouts"))[0], ids=lambda row: row[2].strip("`"))
def test_a_limit_is_what_the_page_says(row: list[str]) -> None:
    """The number beside each name is the code's, or the configuration's default."""
    _, written, where = row
    number, _, unit = written.partition(" ")
    assert float(number) * UNITS[unit] == pytest.approx(value_of(where.strip("`")))


def test_the_page_names_the_protocol() -> None:
    """ALPN and the version that the page describes are those of the code."""
    assert f"`{messages.ALPN}`" in section("Link")
    assert f"The version is one integer, {messages.VERSION} at present" in section("Versions")


def test_the_values_of_t_are_those_of_the_messages() -> None:
    """The table of message types has each one, and no other."""
    found = {row[0].strip("`") for table in tables(section("Messages")) for row in table}
    assert found == set(MESSAGES)


def test_what_an_agent_does_after_a_refusal() -> None:
    """The codes exist, and the numbers are the agent's."""
    text = section("After a refusal")
    named = {word for table in tables(text) for row in table for word in re.findall(r"`(\w+)`", row[0])}
    assert named <= {code.value for code in Refusal} and len(named) > 12
    assert f"for {agent.QUICK_REDIALS + agent.ANY_HOST_REDIALS} dials" in text
    assert f"begins at {agent.BACKOFF_FIRST:g} s" in text and f"lasted {agent.STABLE:g} s" in text
    assert f"and {credentials.LONGEST_PAUSE:g} s" in text


def test_pings_are_sent_when_the_page_says() -> None:
    """The words and the table have the silence after which a look pings, not the time between two looks."""
    text = " ".join(section("yamux").split())
    assert f"{link.PING_AFTER_CLIENT:g} s (agent) or {link.PING_AFTER_SERVER:g} s (broker)" in text
    assert f"to {link.LOOK_CLIENT:g} s, and the broker every" in text and f"to {link.LOOK_SERVER:g} s." in text


def test_a_key_that_comes_twice_has_its_last_value() -> None:
    """The page allows both answers; this is the one that it says of this implementation. Of `t` there is one."""
    pairs = [("t", "bye"), ("reason", "first"), ("reason", "last")]
    assert twice(pairs).reason == "last"
    with pytest.raises(messages.MessageError):
        twice([("t", "bye"), ("t", "drain"), ("reason", "x")])


def test_a_string_that_is_not_utf_8_is_an_error() -> None:
    """In a value; the page says so."""
    body = bytes([0x82]) + msgpack.packb("t") + msgpack.packb("bye") + msgpack.packb("reason") + b"\xa1\xff"
    with pytest.raises(messages.MessageError):
        one(len(body).to_bytes(4, "big") + body, messages.Bye)


def twice(pairs: list[tuple[str, str]]) -> Any:
    """The Bye of a map with these keys and values, in order."""
    body = bytes([0x80 | len(pairs)]) + b"".join(msgpack.packb(word) for pair in pairs for word in pair)
    return one(len(body).to_bytes(4, "big") + body, messages.Bye)
