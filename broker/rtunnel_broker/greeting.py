"""The decision on a Hello: who the agent is, and whether it may have a session here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

from rtunnel.config import canonical_ip, check_word, parse_exposes
from rtunnel.errors import TrustError
from rtunnel.netlink import CONTAINERS
from rtunnel.trust.identity import Identity, Revoked, TrustStore
from rtunnel.wire.messages import Hello
from rtunnel.wire.refusal import Refusal, Refused

#: Seconds that an agent's clock may differ, the time of a Hello on its way included.
CLOCK_SECONDS: Final = 10.0


class GreetedNode(Protocol):
    """The part of the node that the decision needs."""

    node: str
    host: str
    tokens: Mapping[str, bytes]
    draining: bool


def who_greets(
    node: GreetedNode, trust_store: TrustStore | None, hello: Hello, certificate: bytes | None
) -> Identity | bytes:
    """Return the identity of the link's certificate (DER), or the secret of the join token to
    prove.

    `trust_store` checks certificates; None: certificates are not accepted.
    Raises Refused, with the first code that applies in the order of docs/wire.md.
    """
    if fault := hello_fault(hello):
        raise Refused(Refusal.BAD_REQUEST, fault)
    who = _secret(node, hello) if hello.token_id else _certified(trust_store, hello, certificate)
    if node.draining:
        raise Refused(Refusal.DRAINING)
    if node.node in hello.holds:
        raise Refused(Refusal.DUPLICATE_NODE, f"the agent already has a session on {node.node}")
    if node.host in hello.holds_hosts:
        raise Refused(Refusal.DUPLICATE_NODE, f"the agent already has a session on the host {node.host}")
    return who


def hello_fault(hello: Hello) -> str:
    """Return what is wrong with the words of a Hello, or "". They go into registry and logs."""
    try:
        check_word(hello.agent_id)
        check_word(hello.namespace)
        parse_exposes(hello.exposes)
        for address in [*hello.addresses, *(entry.ip for entry in hello.publish)]:
            if canonical_ip(address) != address:
                return f"{address!r} is not the canonical form of an IP address"
    except ValueError as error:
        return str(error)
    return ""


def addresses_fault(addresses: frozenset[str], identity: Identity | None) -> Refused | None:
    """Return why an agent can't answer for these addresses; None when it can.

    `identity`: of its certificate; None: its session is by token.
    """
    try:
        odd = [address for address in addresses if canonical_ip(address) != address]
    except ValueError as error:
        return Refused(Refusal.BAD_REQUEST, str(error))
    if odd:
        return Refused(Refusal.BAD_REQUEST, f"{odd[0]!r} is not the canonical form of an IP address")
    if identity is not None and (foreign := addresses - identity.addresses):
        return Refused(Refusal.BAD_CERTIFICATE, f"{min(foreign)} is not in the certificate of {identity.subject}")
    return None


def doubts(hello: Hello, now: float) -> list[str]:
    """Return what is odd in the facts that an agent tells of its host, a sentence for each.

    The agent gets them as notices, and the broker logs them: they explain failures that come later.
    `now`: seconds since 1970 by this broker's clock.
    """
    found = [
        f"{address} is on {interface}, whose addresses are alike on many hosts: write the address at which clients "
        "know the host (agent.addresses)"
        for address, interface in zip(hello.addresses, hello.interfaces, strict=False)
        if interface.startswith(CONTAINERS)
    ]
    found += [
        f"{address} is not on the agent's host: add it there, or change agent.addresses" for address in hello.lost
    ]
    off = hello.time / 1000 - now
    if hello.time and abs(off) > CLOCK_SECONDS:
        way = "ahead of" if off > 0 else "behind"
        found.append(f"the agent's clock is {abs(off):.0f} s {way} this broker's: set both (NTP)")
    return found


def _secret(node: GreetedNode, hello: Hello) -> bytes:
    secret = node.tokens.get(hello.token_id)
    if secret is None:
        text = f"join token {hello.token_id!r} is not known to this broker"
        if not node.tokens:
            text = "this broker takes certificates only: give the agent an identity (agent.identity)"
        raise Refused(Refusal.BAD_TOKEN, text)
    return secret


def _certified(trust_store: TrustStore | None, hello: Hello, certificate: bytes | None) -> Identity:
    """Return the certificate's identity. Raises Refused unless it is the agent of the Hello."""
    if trust_store is None or certificate is None:
        missing = (
            "this broker takes no certificates (it has no broker.ca)"
            if trust_store is None
            else "the link shows no certificate (agent.identity)"
        )
        text = f"{missing}, and the Hello names no join token"
        if hello.complaint:
            text = f"the agent says that its certificate was rejected: {hello.complaint}"
        raise Refused(Refusal.BAD_CERTIFICATE, text)
    try:
        who = trust_store.verify(certificate, keep=False)
    except TrustError as error:
        code = Refusal.REVOKED if isinstance(error, Revoked) else Refusal.BAD_CERTIFICATE
        raise Refused(code, str(error)) from None
    claimed = f"agent/{hello.namespace}/{hello.agent_id}"
    if who.kind != "agent" or (who.namespace, who.name) != (hello.namespace, hello.agent_id):
        raise Refused(Refusal.BAD_CERTIFICATE, f"the certificate is of {who.subject}, and not of {claimed}")
    foreign = [address for address in hello.addresses if address not in who.addresses]
    if foreign:
        raise Refused(Refusal.BAD_CERTIFICATE, f"{foreign[0]} is not in the certificate of {claimed}")
    return who
