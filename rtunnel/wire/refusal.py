"""The reasons for refusals: one enum for clients, logs and metrics.

The wire value of a code is its word, which log lines and metric labels also use. The SOCKS reply is
from RFC 1928 section 6; the HTTP status and the `Proxy-Status` error token are from RFC 9209
section 2.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum


class Next(Enum):
    """The action of a gateway after a refusal of one candidate tuple."""

    STOP = "stop"  # the answer is about the target itself: another tuple would say the same
    TRY = "try"  # this path failed, and another one may work
    FORGET = "forget"  # the tuple is stale: drop it from the route table, then try another


@dataclass(frozen=True, slots=True)
class ReplyMapping:
    """The replies for one refusal to SOCKS and HTTP clients, and the gateway's next action."""

    socks: int
    http: int
    proxy_status: str
    next: Next
    #: Whether the client is told this code when all paths of its dial have given it; else it is
    #: told `agent_unavailable`. True where the cause is no fault of the paths.
    passed_on: bool
    text: str


class Refusal(StrEnum):
    """All reasons for refusals. `code.reply` says how clients learn of one."""

    # The client's request.
    BAD_REQUEST = "bad_request"
    COMMAND_NOT_SUPPORTED = "command_not_supported"
    ADDRESS_TYPE_NOT_SUPPORTED = "address_type_not_supported"
    NOT_AUTHORISED = "not_authorised"
    AUTHENTICATION_REQUIRED = "authentication_required"
    BAD_CREDENTIALS = "bad_credentials"
    RATE_LIMITED = "rate_limited"
    TOO_MANY_STREAMS = "too_many_streams"
    TOO_MANY_HANDSHAKES = "too_many_handshakes"
    NAME_NOT_SUPPORTED = "name_not_supported"
    UNKNOWN_TARGET = "unknown_target"
    # The target, as the agent saw it.
    NOT_EXPOSED = "not_exposed"
    TARGET_REFUSED = "target_refused"
    TARGET_TIMEOUT = "target_timeout"
    TARGET_UNREACHABLE = "target_unreachable"
    # The path: another tuple may work.
    AGENT_UNAVAILABLE = "agent_unavailable"
    BROKER_UNREACHABLE = "broker_unreachable"
    DIAL_TIMEOUT = "dial_timeout"
    LINK_LOST = "link_lost"
    DRAINING = "draining"
    OVERLOADED = "overloaded"
    # The tuple is stale.
    STALE_NODE = "stale_node"
    STALE_TARGET = "stale_target"
    STALE_EPOCH = "stale_epoch"
    # The Dial itself.
    BAD_MAC = "bad_mac"
    EXPIRED = "expired"
    REPLAYED = "replayed"
    NOT_PROVEN = "not_proven"
    # Sessions.
    DUPLICATE_NODE = "duplicate_node"
    VERSION = "version"
    BAD_TOKEN = "bad_token"  # noqa: S105 - a word, not a secret
    BAD_CERTIFICATE = "bad_certificate"
    REVOKED = "revoked"
    ADDRESS_TAKEN = "address_taken"
    AGENT_ID_TAKEN = "agent_id_taken"
    DUPLICATE_AGENT = "duplicate_agent"
    AUTHORITY_UNAVAILABLE = "authority_unavailable"
    PORTS_EXHAUSTED = "ports_exhausted"
    PORT_TAKEN = "port_taken"
    PORT_NOT_ALLOWED = "port_not_allowed"
    REGISTRY_UNAVAILABLE = "registry_unavailable"
    PROTOCOL_ERROR = "protocol_error"
    INTERNAL = "internal"

    @property
    def reply(self) -> ReplyMapping:
        """The replies and the next action for this refusal."""
        return _REPLIES[self]

    @classmethod
    def parse(cls, word: str) -> Refusal:
        """Return the code of a word from the wire; an unknown word is INTERNAL."""
        return _BY_WORD.get(word, cls.INTERNAL)


class Refused(Exception):
    """A refusal, raised until the code that answers the client catches it."""

    def __init__(self, code: Refusal, text: str = "") -> None:
        super().__init__(text or code.reply.text)
        self.code = code

    @property
    def text(self) -> str:
        """The sentence for display: a specific one if given, else the code's own."""
        return str(self.args[0])


# RFC 1928 section 6
GENERAL_FAILURE = 0x01
NOT_ALLOWED = 0x02
NETWORK_UNREACHABLE = 0x03
HOST_UNREACHABLE = 0x04
CONNECTION_REFUSED = 0x05
TTL_EXPIRED = 0x06
COMMAND_UNSUPPORTED = 0x07
ADDRESS_UNSUPPORTED = 0x08

_STOP, _TRY, _FORGET = Next.STOP, Next.TRY, Next.FORGET
_PASSED_ON, _KEPT = True, False
_R = Refusal
_REPLIES: dict[Refusal, ReplyMapping] = {
    _R.BAD_REQUEST: ReplyMapping(
        GENERAL_FAILURE, 400, "http_request_error", _STOP, _PASSED_ON, "the request is malformed"
    ),
    _R.COMMAND_NOT_SUPPORTED: ReplyMapping(
        COMMAND_UNSUPPORTED, 501, "http_request_denied", _STOP, _PASSED_ON, "only CONNECT is supported"
    ),
    _R.ADDRESS_TYPE_NOT_SUPPORTED: ReplyMapping(
        ADDRESS_UNSUPPORTED, 400, "http_request_error", _STOP, _PASSED_ON, "the address type is not supported"
    ),
    _R.NOT_AUTHORISED: ReplyMapping(NOT_ALLOWED, 403, "http_request_denied", _STOP, _PASSED_ON, "not allowed"),
    _R.AUTHENTICATION_REQUIRED: ReplyMapping(
        NOT_ALLOWED, 407, "http_request_denied", _STOP, _PASSED_ON, "a user name and a password are needed"
    ),
    _R.BAD_CREDENTIALS: ReplyMapping(
        NOT_ALLOWED, 407, "http_request_denied", _STOP, _PASSED_ON, "the user name or the password is not right"
    ),
    _R.RATE_LIMITED: ReplyMapping(
        GENERAL_FAILURE, 429, "connection_limit_reached", _STOP, _PASSED_ON, "too many new connections in a short time"
    ),
    _R.TOO_MANY_STREAMS: ReplyMapping(
        GENERAL_FAILURE, 429, "connection_limit_reached", _TRY, _PASSED_ON, "too many streams at once"
    ),
    _R.TOO_MANY_HANDSHAKES: ReplyMapping(
        GENERAL_FAILURE,
        429,
        "connection_limit_reached",
        _STOP,
        _PASSED_ON,
        "too many connections that are not streams yet",
    ),
    _R.NAME_NOT_SUPPORTED: ReplyMapping(
        HOST_UNREACHABLE, 502, "dns_error", _STOP, _PASSED_ON, "names are not resolved here: dial the original IP"
    ),
    _R.UNKNOWN_TARGET: ReplyMapping(
        HOST_UNREACHABLE, 502, "destination_not_found", _STOP, _PASSED_ON, "no agent answers for this address"
    ),
    _R.NOT_EXPOSED: ReplyMapping(
        NOT_ALLOWED, 403, "destination_ip_prohibited", _STOP, _PASSED_ON, "the agent does not expose this port"
    ),
    _R.TARGET_REFUSED: ReplyMapping(
        CONNECTION_REFUSED, 502, "connection_refused", _STOP, _PASSED_ON, "the target refused the connection"
    ),
    _R.TARGET_TIMEOUT: ReplyMapping(
        TTL_EXPIRED, 504, "connection_timeout", _STOP, _PASSED_ON, "the target did not answer the agent in time"
    ),
    _R.TARGET_UNREACHABLE: ReplyMapping(
        NETWORK_UNREACHABLE, 502, "destination_ip_unroutable", _STOP, _PASSED_ON, "the agent has no route to the target"
    ),
    _R.AGENT_UNAVAILABLE: ReplyMapping(
        HOST_UNREACHABLE, 503, "destination_unavailable", _TRY, _KEPT, "no path to the agent works at present"
    ),
    _R.BROKER_UNREACHABLE: ReplyMapping(
        HOST_UNREACHABLE, 503, "destination_unavailable", _TRY, _KEPT, "the broker could not be reached"
    ),
    _R.DIAL_TIMEOUT: ReplyMapping(
        TTL_EXPIRED, 504, "connection_timeout", _TRY, _KEPT, "neither broker nor agent answered in time"
    ),
    _R.LINK_LOST: ReplyMapping(HOST_UNREACHABLE, 503, "connection_terminated", _TRY, _KEPT, "the agent's link is gone"),
    _R.DRAINING: ReplyMapping(HOST_UNREACHABLE, 503, "destination_unavailable", _TRY, _KEPT, "the node is draining"),
    _R.OVERLOADED: ReplyMapping(
        GENERAL_FAILURE, 503, "connection_limit_reached", _TRY, _PASSED_ON, "a limit is reached"
    ),
    _R.STALE_NODE: ReplyMapping(
        HOST_UNREACHABLE, 503, "destination_unavailable", _FORGET, _KEPT, "the tuple names another node"
    ),
    _R.STALE_TARGET: ReplyMapping(
        HOST_UNREACHABLE, 503, "destination_unavailable", _FORGET, _KEPT, "the port is not leased to this target"
    ),
    _R.STALE_EPOCH: ReplyMapping(
        HOST_UNREACHABLE, 503, "destination_unavailable", _FORGET, _KEPT, "the tuple's session is over"
    ),
    _R.BAD_MAC: ReplyMapping(
        GENERAL_FAILURE, 502, "proxy_internal_response", _TRY, _KEPT, "the Dial's MAC is not by the gateway's key"
    ),
    _R.EXPIRED: ReplyMapping(
        GENERAL_FAILURE,
        502,
        "proxy_internal_response",
        _TRY,
        _PASSED_ON,
        "the Dial's time is too far from the broker's clock",
    ),
    _R.REPLAYED: ReplyMapping(
        GENERAL_FAILURE, 502, "proxy_internal_response", _TRY, _KEPT, "the Dial's nonce was used before"
    ),
    _R.NOT_PROVEN: ReplyMapping(
        GENERAL_FAILURE, 502, "proxy_internal_response", _TRY, _KEPT, "the agent did not prove that it has this address"
    ),
    _R.DUPLICATE_NODE: ReplyMapping(
        GENERAL_FAILURE, 500, "proxy_internal_error", _STOP, _PASSED_ON, "the agent already has a session on this node"
    ),
    _R.VERSION: ReplyMapping(
        GENERAL_FAILURE, 500, "proxy_internal_error", _TRY, _KEPT, "the two ends speak different versions"
    ),
    _R.BAD_TOKEN: ReplyMapping(
        GENERAL_FAILURE, 500, "proxy_internal_error", _STOP, _PASSED_ON, "the join token is not known or not right"
    ),
    _R.BAD_CERTIFICATE: ReplyMapping(
        GENERAL_FAILURE,
        500,
        "proxy_internal_error",
        _STOP,
        _PASSED_ON,
        "the certificate is missing, or says something else",
    ),
    _R.REVOKED: ReplyMapping(
        GENERAL_FAILURE, 502, "proxy_internal_error", _TRY, _KEPT, "the certificate or key is revoked"
    ),
    _R.ADDRESS_TAKEN: ReplyMapping(
        GENERAL_FAILURE, 500, "proxy_internal_error", _STOP, _PASSED_ON, "another agent has this address at present"
    ),
    _R.AGENT_ID_TAKEN: ReplyMapping(
        GENERAL_FAILURE, 500, "proxy_internal_error", _STOP, _PASSED_ON, "another agent has this agent_id at present"
    ),
    _R.DUPLICATE_AGENT: ReplyMapping(
        GENERAL_FAILURE, 500, "proxy_internal_error", _STOP, _PASSED_ON, "another host has a session with this agent_id"
    ),
    _R.AUTHORITY_UNAVAILABLE: ReplyMapping(
        GENERAL_FAILURE, 503, "proxy_internal_error", _TRY, _KEPT, "the authority can't be reached"
    ),
    _R.PORTS_EXHAUSTED: ReplyMapping(
        GENERAL_FAILURE, 500, "proxy_internal_error", _STOP, _PASSED_ON, "the broker's port range is used up"
    ),
    _R.PORT_TAKEN: ReplyMapping(
        GENERAL_FAILURE, 500, "proxy_internal_error", _STOP, _PASSED_ON, "the fixed port is in use on the broker"
    ),
    _R.PORT_NOT_ALLOWED: ReplyMapping(
        GENERAL_FAILURE, 500, "proxy_internal_error", _STOP, _PASSED_ON, "the broker does not allow this open port"
    ),
    _R.REGISTRY_UNAVAILABLE: ReplyMapping(
        GENERAL_FAILURE, 503, "proxy_internal_error", _TRY, _KEPT, "the registry can't be reached"
    ),
    _R.PROTOCOL_ERROR: ReplyMapping(
        GENERAL_FAILURE, 502, "proxy_internal_response", _TRY, _KEPT, "the peer broke the protocol"
    ),
    _R.INTERNAL: ReplyMapping(GENERAL_FAILURE, 500, "proxy_internal_error", _TRY, _KEPT, "internal error"),
}
_BY_WORD = {code.value: code for code in Refusal}
