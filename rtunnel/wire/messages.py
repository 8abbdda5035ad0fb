"""Messages: MessagePack maps behind a 4-byte big-endian length (docs/wire.md is normative).

Control stream: Hello -> [Challenge -> Proof ->] Welcome | Refused, then Update, Trust, Drain, Bye;
on a link of its own Enrol -> Enrolled | Refused. With the authority: Enrol, and Follow -> Trust.
Proxied streams (and guarded ports): Dial -> [Hop ->] [Dialling ->] Accepted | Refused, then raw
bytes.

Each map carries its type under the key ``t``. Unknown keys are ignored; an unknown type, a missing
key, a value of a wrong type or size, and a frame over the limit are each a `MessageError` whose
text names the fault.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Annotated, Final, Generic, TypeVar, Union

import msgspec

from rtunnel.wire.yamux import INITIAL_WINDOW

VERSION = 1
#: ALPN of a TLS link, and of TLS to a guarded port.
ALPN = "rtunnel/1"
DIAL_ALPN = "rtunnel-dial/1"

#: A message's body before the peer is authenticated.
MAX_UNAUTHENTICATED = 4 * 1024
#: A Hello: 64 addresses, 256 exposed ports, 64 open ports and the longest names are 28,318 bytes;
#: the rest is for networks. 1024 handshakes hold 80 MB of them at most, decoded.
MAX_HELLO = 32 * 1024
#: A message's body afterwards.
MAX_MESSAGE = 64 * 1024

#: A trust list, and a certificate.
MAX_LIST = 60_000
MAX_CERTIFICATE = 3072
#: The body of a Dial: ordinary names take 250 bytes.
MAX_BODY = 1024

#: The body of an answer to a Dial that asks for a trace, and the agent's report in it.
MAX_TRACED = 8 * 1024
MAX_HOP = 512
#: Bytes of filler in a broker's report: more than one packet of an Ethernet, and few.
MAX_PADDING = 4 * 1024

#: Code points of a sentence for people.
MAX_TEXT = 512
#: Nodes, and hosts, that a Hello names.
MAX_HOLDS = 16
#: Lost addresses that a Hello names.
MAX_LOST = 16

NONCE_BYTES = 16
MAC_BYTES = 32
#: An X25519 public key (RFC 7748), and the id of a pair's key.
EXCHANGE_BYTES = 32
PAIR_ID_BYTES = 8

_LENGTH = struct.Struct(">I")

Word = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Address = Annotated[str, msgspec.Meta(min_length=2, max_length=45)]
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Mac = Annotated[bytes, msgspec.Meta(min_length=MAC_BYTES, max_length=MAC_BYTES)]
MacOrNone = Annotated[bytes, msgspec.Meta(max_length=MAC_BYTES)]
Exchange = Annotated[bytes, msgspec.Meta(max_length=EXCHANGE_BYTES)]
PairId = Annotated[bytes, msgspec.Meta(max_length=PAIR_ID_BYTES)]
Id = Annotated[str, msgspec.Meta(max_length=128)]
Certificate = Annotated[bytes, msgspec.Meta(max_length=MAX_CERTIFICATE)]
HopBytes = Annotated[bytes, msgspec.Meta(max_length=MAX_HOP)]
Padding = Annotated[bytes, msgspec.Meta(max_length=MAX_PADDING)]
Signature = Annotated[bytes, msgspec.Meta(max_length=128)]
Interface = Annotated[str, msgspec.Meta(max_length=16)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
PortOrAny = Annotated[int, msgspec.Meta(ge=0, le=65535)]
StartWindow = Annotated[int, msgspec.Meta(ge=4096, le=INITIAL_WINDOW)]
Unsigned64 = Annotated[int, msgspec.Meta(ge=0)]  # MessagePack has no larger ones


class MessageError(Exception):
    """The peer sent something that is not a message of this protocol; the text names the fault.

    `other_version`: it said that it speaks another version, which explains the rest.
    """

    def __init__(self, text: str, *, other_version: bool = False) -> None:
        super().__init__(text)
        self.other_version = other_version


class Message(msgspec.Struct, tag_field="t", frozen=True):
    """Base of all messages."""


class _Nothing(msgspec.Struct, tag_field="t", tag="(nothing)", frozen=True):
    """A type that no map can have; `_decoder_of` says why it is needed."""

    never: Annotated[int, msgspec.Meta(ge=1, le=0)]


class Publish(msgspec.Struct, frozen=True):
    """An open port that the agent asks for: raw bytes from (PS IP, port) to ip:target_port."""

    ip: Address
    target_port: Port
    port: PortOrAny = 0  # 0: any free one
    allow: Annotated[list[Address | Word], msgspec.Meta(max_length=64)] = []


class OpenPort(msgspec.Struct, frozen=True):
    """An open port as granted."""

    port: Port
    ip: Address
    target_port: Port


class Hello(Message, tag="hello", frozen=True):
    """Agent -> broker, first message of a link."""

    version: int
    agent_id: Word
    instance: Nonce  # random per agent process: tells a restarted agent from a duplicate session
    namespace: Word
    addresses: Annotated[list[Address], msgspec.Meta(min_length=1, max_length=64)]
    nonce: Nonce
    token_id: Id = ""  # empty: the certificate of the link says who it is
    exposes: Annotated[list[Word], msgspec.Meta(max_length=256)] = []
    publish: Annotated[list[Publish], msgspec.Meta(max_length=64)] = []
    # nodes on which it has a live session
    holds: Annotated[list[Word], msgspec.Meta(max_length=MAX_HOLDS)] = []
    # hosts on which it wants no other
    holds_hosts: Annotated[list[Word], msgspec.Meta(max_length=MAX_HOLDS)] = []
    software: Text = ""
    trust: Unsigned64 = 0  # the generation of the trust list that it has
    start_window: StartWindow = INITIAL_WINDOW  # with which its streams can begin
    # tells a restart from a second host; opaque
    host_id: Annotated[bytes, msgspec.Meta(max_length=NONCE_BYTES)] = b""
    host: Id = ""  # the agent's machine, for people
    time: Unsigned64 = 0  # ms since 1970 by the agent's clock; 0: not told
    # the network interface of each address, in their order; empty: not known
    interfaces: Annotated[list[Interface], msgspec.Meta(max_length=64)] = []
    # addresses that the agent should have, and its host has not
    lost: Annotated[list[Address], msgspec.Meta(max_length=MAX_LOST)] = []
    certificate_end: Unsigned64 = 0  # seconds since 1970; 0: it has none
    complaint: Text = ""  # why TLS has failed with its certificate; empty: it has not


class Enrol(Message, tag="enrol", frozen=True):
    """Agent -> broker -> authority, the first message of a link of its own: the request for a
    certificate.

    Proved by a join token (`token_id`, `mac`), or to renew by the key of the present `certificate`
    (`signature`).
    """

    version: int
    request: Certificate  # PKCS #10 (RFC 2986), DER
    token_id: Id = ""
    mac: MacOrNone = b""
    certificate: Certificate = b""
    signature: Signature = b""


class Enrolled(Message, tag="enrolled", frozen=True):
    """Authority -> broker -> agent: the certificate, and the trust list in force."""

    certificate: Certificate
    trust: Annotated[bytes, msgspec.Meta(max_length=MAX_LIST)] = b""


class Follow(Message, tag="follow", frozen=True):
    """Broker or gateway -> authority: the trust list, if it is newer than this number."""

    version: int
    number: Unsigned64 = 0


class Trust(Message, tag="trust", frozen=True):
    """Authority -> broker or gateway, broker -> agent: the trust list; empty when there is no newer
    one.
    """

    signed: Annotated[bytes, msgspec.Meta(max_length=MAX_LIST)] = b""


class Challenge(Message, tag="challenge", frozen=True):
    """Broker -> agent: a nonce, and proof that the broker knows the join token too."""

    nonce: Nonce
    mac: Mac
    version: int = VERSION


class Proof(Message, tag="proof", frozen=True):
    """Agent -> broker: proof of the join token over the whole exchange."""

    mac: Mac


class Welcome(Message, tag="welcome", frozen=True):
    """Broker -> agent: the session exists and its tuples are in the registry."""

    node: Word
    host: Word
    epoch: Unsigned64
    ip: Address  # the PS IP
    port: Port  # the guarded port
    heartbeat: float  # seconds between the registry heartbeats of this node
    open_ports: list[OpenPort] = []
    notices: list[Text] = []  # what was asked for and not granted
    software: Text = ""
    start_window: StartWindow = INITIAL_WINDOW  # with which the session's streams begin, both ways


class Refuse(Message, tag="refused", frozen=True, omit_defaults=True):
    """The answer no, to a Hello or a Dial; `code` is a word of `refusal.Refusal`.

    An agent proves a refusal of a Dial as it proves Accepted, when the refusal is about the target.
    """

    code: Word
    text: Text = ""
    mac: MacOrNone = b""
    certificate: Certificate = b""
    exchange: Exchange = b""
    signature: Signature = b""
    time: Unsigned64 = 0  # with `expired`: ms since 1970 by the broker's clock
    hop: HopBytes = b""  # an encoded AgentHop, if the Dial asks for a trace


class Update(Message, tag="update", frozen=True):
    """Agent -> broker: the exposed ports or the addresses changed, or the agent has another
    certificate (`identity.prove_session`).
    """

    exposes: Annotated[list[Word], msgspec.Meta(max_length=256)]
    certificate: Certificate = b""
    signature: Signature = b""
    # all that it has now; empty: as before
    addresses: Annotated[list[Address], msgspec.Meta(max_length=64)] = []


class Drain(Message, tag="drain", frozen=True):
    """Broker -> agent: the node goes away; streams may finish within `deadline` seconds."""

    deadline: float


class Bye(Message, tag="bye", frozen=True):
    """Either end: the session ends on purpose."""

    reason: Text = ""


class Dial(Message, tag="dial", frozen=True):
    """Gateway -> broker -> agent: `body` is an encoded DialBody, `mac` is HMAC-SHA256 over exactly
    those bytes.
    """

    body: Annotated[bytes, msgspec.Meta(max_length=MAX_BODY)]
    mac: MacOrNone = b""  # empty from a broker's own open port
    key: Id = ""  # the id of the gateway's key


class DialBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """The target that a Dial asks for, and by whom."""

    version: int
    namespace: Word
    ip: Address
    port: Port
    node: Word
    epoch: Unsigned64
    nonce: Nonce
    time: int  # milliseconds since 1970, UTC
    who: Text = ""
    exchange: Exchange = b""  # the gateway's part of keys of pairs; empty: it asks for no proof
    pair: PairId = b""  # the id of the key that it has with this target's agent
    trace: bool = False  # broker and agent shall say what they see (Hop, AgentHop)


class Dialling(Message, tag="dialling", frozen=True):
    """Agent -> gateway: the Dial is good and the target is being connected; it is slow, the path is
    not.
    """


class Hop(Message, tag="hop", frozen=True):
    """Broker -> gateway: the broker's report on a Dial that asks for a trace. It comes once, before
    the broker passes the Dial on or refuses it.
    """

    node: Word
    time: Unsigned64  # ms since 1970 by the broker's clock
    software: Text = ""
    agent: Id = ""  # the agent_id of the port's session; empty: it has no session now
    peer: Text = ""  # the address from which the agent's link comes
    rtt: float = 0.0  # seconds of the link's last ping; 0: none yet
    silence: float = 0.0  # seconds since the agent's last byte
    streams: Unsigned64 = 0  # open streams of the session
    # how often TCP has sent the link's oldest bytes again since the last acknowledgement
    resending: Unsigned64 = 0
    sessions: Unsigned64 = 0  # of the node, or of the part of them that was looked at
    silent: Unsigned64 = 0  # those of them that are silent for longer than a link that lives
    padding: Padding = b""  # makes the report longer than one packet; its bytes say nothing


class AgentHop(msgspec.Struct, frozen=True):
    """The agent's report on a Dial that asks for a trace, in its answer and under the proof."""

    agent: Id
    time: Unsigned64  # ms since 1970 by the agent's clock
    software: Id = ""
    way: Id = ""  # the address to which it connects; empty: the Dial was refused before
    source: Id = ""  # its own address of that connection; empty: not connected
    interface: Id = ""  # through which packets to `way` leave; empty: not known
    local: bool = False  # `way` is an address of the agent's own host
    connect: float = 0.0  # seconds from the Dial to the connection, or to its failure
    errno: Id = ""  # of the connect, as "ECONNREFUSED"
    doubt: Id = ""  # why the agent is not ready, in its own words; empty: it is


class Accepted(Message, tag="accepted", frozen=True, omit_defaults=True):
    """Agent -> gateway: the target is connected; raw bytes follow.

    Proved by MAC under the key of the pair, or for the first time by a signature with the key of
    `certificate`, over the agent's part of the key of the pair (`exchange`) and the Dial's body.
    """

    mac: MacOrNone = b""
    certificate: Certificate = b""
    exchange: Exchange = b""
    signature: Signature = b""
    hop: HopBytes = b""  # as in Refuse


ControlMessage = Hello | Enrol | Enrolled | Trust | Challenge | Proof | Welcome | Refuse | Update | Drain | Bye
DialAnswer = Hop | Dialling | Accepted | Refuse
DIAL_ANSWERS: Final[tuple[type[DialAnswer], ...]] = (Hop, Dialling, Accepted, Refuse)

_encoder = msgspec.msgpack.Encoder()
_body_decoder = msgspec.msgpack.Decoder(DialBody)
_hop_decoder = msgspec.msgpack.Decoder(AgentHop)
M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """Return one frame: length and body."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def encode_body(body: DialBody) -> bytes:
    """Return the bytes that a Dial carries and its MAC covers. Cuts `who` where the body would be
    over its limit.
    """
    raw = _encoder.encode(body)
    if len(raw) > MAX_BODY:
        who = body.who.encode()
        kept = who[: max(0, len(who) - (len(raw) - MAX_BODY))].decode(errors="ignore")
        raw = _encoder.encode(msgspec.structs.replace(body, who=kept))
    return raw


def decode_body(body: bytes) -> DialBody:
    """Return the DialBody in these bytes, the inverse of `encode_body`. Raises MessageError."""
    try:
        return _body_decoder.decode(body)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise MessageError(f"bad Dial body: {error}") from None


def encode_hop(hop: AgentHop) -> bytes:
    """Return an agent's report as its answer carries it; empty when it would be over MAX_HOP."""
    raw = _encoder.encode(hop)
    return raw if len(raw) <= MAX_HOP else b""


def decode_hop(raw: bytes) -> AgentHop:
    """The inverse of `encode_hop`, of bytes that are not empty. Raises MessageError."""
    try:
        return _hop_decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise MessageError(f"bad report of an agent: {error}") from None


@cache
def _decoder_of(expected: tuple[type[M], ...]) -> msgspec.msgpack.Decoder[M]:
    """Return the decoder for these types. It is kept: to make one takes longer than to decode with
    it.

    Where one type alone is expected, msgspec takes a map without `t`; where two are, it does not.
    """
    return msgspec.msgpack.Decoder(Union[(*expected, _Nothing)])


def split_frame(data: bytes | bytearray, decoder: msgspec.msgpack.Decoder[M], limit: int) -> tuple[M, int] | None:
    """Return the message of the first frame and the index of that frame's end; None until it is
    whole.

    `limit`: bytes of the message without its length. Raises MessageError.
    """
    if len(data) < 4:
        return None
    (length,) = _LENGTH.unpack_from(data)
    if length > limit:
        raise MessageError(f"message of {length} bytes is over the limit of {limit}")
    end = 4 + length
    if len(data) < end:
        return None
    try:
        return decoder.decode(data[4:end]), end
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        note = _version_note(data[4:end])
        raise MessageError(f"bad message: {error}{note}", other_version=bool(note)) from None


class Decoder(Generic[M]):
    """Cuts a byte stream into messages of the expected types, and of no other type.

    Call `feed` with bytes, then `next` until it returns None. After the last message that is
    wanted, `rest` returns the bytes that followed it: they belong to the raw stream.

    Where several types are expected, name them as the type parameter too:
    `Decoder[Hello | Enrol](Hello, Enrol)`. Then mypy checks that a `match` on a message has a case
    for each of them.
    """

    __slots__ = ("_buffer", "_decoder", "limit")

    def __init__(self, *expected: type[M], limit: int = MAX_UNAUTHENTICATED) -> None:
        """Expect messages of these types, with bodies of at most `limit` bytes."""
        self._decoder: msgspec.msgpack.Decoder[M] = _decoder_of(expected)
        self._buffer = bytearray()
        self.limit = limit

    def expect(self, *expected: type[M]) -> None:
        """Accept messages of these types only, from the next message on."""
        self._decoder = _decoder_of(expected)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes in any split."""
        self._buffer += data

    def next(self) -> M | None:
        """Return the next whole message, or None when more bytes are needed. Raises
        MessageError.
        """
        frame = self.next_frame()
        return None if frame is None else frame[0]

    def next_frame(self) -> tuple[M, bytes] | None:
        """Return what `next` does, with the frame's exact bytes (to pass on, or for a MAC)."""
        buffer = self._buffer
        found = split_frame(buffer, self._decoder, self.limit)
        if found is None:
            return None
        message, end = found
        frame = bytes(buffer[:end])
        del buffer[:end]
        return message, frame

    def rest(self) -> bytes:
        """Take out the bytes after the last message."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest


class _AnyVersion(msgspec.Struct):
    t: str
    version: int


def _version_note(body: bytes | bytearray) -> str:
    """Return a text that names both versions if the message is of another one, whose shape may
    differ.
    """
    try:
        peer = msgspec.msgpack.decode(body, type=_AnyVersion)
    except Exception:
        return ""
    return "" if peer.version == VERSION else f" (the peer speaks version {peer.version}, this end {VERSION})"
