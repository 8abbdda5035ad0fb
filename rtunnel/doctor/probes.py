"""Connects to the addresses that a role dials, as the role would, and notes what comes back.

No probe joins, dials or registers anything. A broker sees links that end without a Hello.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import socket
import ssl
import struct
import termios
import time
from dataclasses import dataclass, replace
from typing import Final

from rtunnel import netlink
from rtunnel.config import parse_endpoint
from rtunnel.doctor.facts import Endpoint, Path
from rtunnel.wire.messages import MAX_HELLO

#: Addresses of one name that are probed: a VIP has one or two.
MAX_IPS: Final = 4
#: Connects to one address, to see whether a VIP spreads them. With two brokers in turn, all six
#: lead to one by chance once in 32 times.
CONNECTS: Final = 6
#: Seconds for a TCP connect, and as many for the TLS handshake.
PATIENCE: Final = 5.0
#: Bytes that are sent to see whether full segments are acknowledged: several segments of 1460
#: bytes, and no more than the part of a Hello that a broker reads before it must be whole.
PUSHED: Final = 16 * 1024
#: Seconds for the acknowledgements: a segment is sent again after 0.2, 0.6 and 1.4 s.
PATH_PATIENCE: Final = 3.0
#: Seconds between two looks at the socket's queue.
_LOOK: Final = 0.02

#: TCP_CLOSE, after a reset (linux/tcp_states.h).
_CLOSED: Final = 7
#: struct tcp_info (linux/tcp.h): eight bytes, then 32-bit fields, of which these are read.
_INFO_BYTES: Final = 104
_SND_MSS, _PMTU, _TOTAL_RETRANS = 2, 13, 23


@dataclass(frozen=True, slots=True)
class Plan:
    """How one address is probed: by TLS (`context`) or not, and how often."""

    key: str
    name: str  # host:port
    context: ssl.SSLContext | None = None
    server_name: str = ""
    connects: int = 1
    push: bool = False  # send some KiB, and look whether they are acknowledged


def probe(plan: Plan) -> list[Endpoint]:
    """Return the facts about each address of the plan's name. Blocks for some seconds at most for
    each address.
    """
    host, port = parse_endpoint(plan.name)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return [Endpoint(plan.key, plan.name, error=f"the name {host} is not resolved: {error.strerror or error}")]
    ips = list(dict.fromkeys(str(entry[4][0]) for entry in found))[:MAX_IPS]
    return [_probe_ip(plan, ip, port) for ip in ips]


def _probe_ip(plan: Plan, ip: str, port: int) -> Endpoint:
    interface, local = "", False
    with contextlib.suppress(OSError):
        interface, local = netlink.route_to(ip)
    endpoint = Endpoint(plan.key, plan.name, ip, interface, local, secure=plan.context is not None)
    for number in range(plan.connects):
        endpoint = _connect(plan, replace(endpoint, connects=number + 1), ip, port)
        if endpoint.error or endpoint.tls_error:
            break
    return endpoint


def _connect(plan: Plan, endpoint: Endpoint, ip: str, port: int) -> Endpoint:
    began = time.monotonic()
    try:
        sock = socket.create_connection((ip, port), PATIENCE)
    except OSError as error:
        return replace(endpoint, error=_reason(error))
    with sock:
        took = round((time.monotonic() - began) * 1000, 3)
        endpoint = replace(
            endpoint, connected=endpoint.connected + 1, connect_ms=took, source=str(sock.getsockname()[0])
        )
        push = plan.push and endpoint.connects == 1
        if plan.context is None:
            return replace(endpoint, path=_push(sock, sock)) if push else endpoint
        try:
            secure = plan.context.wrap_socket(sock, server_hostname=plan.server_name)
        except OSError as error:
            return replace(endpoint, tls_error=_tls_reason(error), not_tls=_is_no_tls(error))
        with secure:
            der = secure.getpeercert(binary_form=True) or b""
            mark = hashlib.sha256(der).hexdigest()[:16]
            return replace(
                endpoint,
                alpn=secure.selected_alpn_protocol() is not None,
                certificates=tuple(dict.fromkeys((*endpoint.certificates, mark))),
                path=_push(secure, secure) if push else endpoint.path,
            )


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {PATIENCE:g} s"
    return (error.strerror or str(error)).lower()


def _tls_reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return f"no TLS answer within {PATIENCE:g} s"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLEOFError | ConnectionError):
        return "the peer closes the connection without TLS"
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).lower().replace("_", " ")
    return str(error)


def _is_no_tls(error: OSError) -> bool:
    """Return whether the peer has answered with something else than TLS, or with nothing."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return False
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        return error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")
    return True


def _push(sock: socket.socket, sender: socket.socket) -> Path:
    """Send the beginning of a long Hello, and look whether its segments are acknowledged."""
    try:
        sender.sendall(MAX_HELLO.to_bytes(4, "big") + bytes(PUSHED - 4))
    except OSError:
        pass  # closed by the peer, which has thus answered
    deadline = time.monotonic() + PATH_PATIENCE
    while True:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        fields = struct.unpack_from("=24I", info, 8)
        done = info[0] == _CLOSED or not _queued(sock)
        if done or time.monotonic() > deadline:
            return Path(fields[_SND_MSS], fields[_PMTU], PUSHED, done, fields[_TOTAL_RETRANS])
        time.sleep(_LOOK)


def _queued(sock: socket.socket) -> int:
    """Return the bytes that the peer has not acknowledged (tcp(7), SIOCOUTQ)."""
    return int(struct.unpack("=i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0])
