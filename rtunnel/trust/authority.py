"""The authority's decisions about Enrol requests. All of it blocks. Not thread-safe."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from rtunnel.errors import TrustError
from rtunnel.trust.certificates import ENROL_LABEL, RENEW_LABEL, Request, key_hash, load_request, read_request
from rtunnel.trust.identity import Identity, read_certificate
from rtunnel.trust.keys import token_mac
from rtunnel.trust.pki import AddressHeld, Directory, KeyRevoked, utc
from rtunnel.trust.store import StoreFault, TokenRecord
from rtunnel.wire.messages import VERSION, Enrol, Enrolled
from rtunnel.wire.refusal import Refusal, Refused


@dataclass(frozen=True, slots=True)
class Granted:
    """A certificate that was issued, with what the log says about it."""

    answer: Enrolled
    request: Request
    token_id: str  # "" for a renewal
    ends: float
    took_over: tuple[str, ...] = ()  # the agents that lose their agent_id or an address to this one


@dataclass(frozen=True, slots=True)
class _Due:
    """The certificate that a request may have: the requested contents, for this many seconds."""

    asked: Request
    seconds: float
    token: TokenRecord | None = None  # None for a renewal
    again: bool = False  # the token has already counted this request
    origin: str = ""  # the token with which the agent first enrolled
    revokes: bool = False  # the earlier certificates of the agent_id are revoked by it


class Authority:
    """Decides Enrol requests with a directory that `pki.init` made."""

    def __init__(self, directory: Directory, *, renew_unknown: bool = False) -> None:
        """`renew_unknown`: also renew certificates that the store does not know."""
        self.directory = directory
        self._renew_unknown = renew_unknown

    def enrol(self, enrol: Enrol) -> Granted:
        """Answer an Enrol.

        Raises Refused, or StoreFault when the store cannot be used at present.
        """
        if enrol.version != VERSION:
            raise Refused(Refusal.VERSION, f"version {enrol.version} is not supported here, only {VERSION}")
        # Decided once without a lock: rejected requests must not keep `rtunnel pki revoke` waiting.
        self.directory.refresh()
        self._due(enrol)
        with self.directory.change():
            return self._issue(self._due(enrol))

    def _due(self, enrol: Enrol) -> _Due:
        """Return the certificate that this request may have now. Raises Refused."""
        renews = bool(enrol.certificate) and not enrol.token_id
        due = self._renewal(enrol) if renews else self._first(enrol)
        try:
            self.directory.check_key(due.asked.public_key)
            if due.token is None or not due.token.take_over:
                self.directory.check_addresses(due.asked.subject, due.asked.namespace, due.asked.addresses)
        except KeyRevoked as error:
            raise Refused(Refusal.REVOKED, str(error)) from None
        except AddressHeld as error:
            raise Refused(Refusal.ADDRESS_TAKEN, str(error)) from None
        return due

    def _token(self, enrol: Enrol) -> TokenRecord:
        """Return the token that the request proves. Raises Refused."""
        token = self.directory.store.token(enrol.token_id)
        if token is None:
            raise Refused(
                Refusal.BAD_TOKEN,
                f"no join token {enrol.token_id!r} is known here: create one (rtunnel pki token create)",
            )
        if not hmac.compare_digest(token_mac(token.secret, ENROL_LABEL, enrol.request), enrol.mac):
            raise Refused(
                Refusal.BAD_TOKEN, f"the proof of join token {token.id!r} is wrong: give the agent that token's line"
            )
        return token

    def _first(self, enrol: Enrol) -> _Due:
        token = self._token(enrol)
        # The requester has the token's secret, so that refusals below may say what is wrong.
        if token.revoked:
            raise Refused(
                Refusal.BAD_TOKEN,
                f"join token {token.id!r} is revoked: create a new one (rtunnel pki token create)",
            )
        if token.ends <= self.directory.now():
            raise Refused(
                Refusal.BAD_TOKEN,
                f"join token {token.id!r} expired at {utc(token.ends)}: create a new one (rtunnel pki token create)",
            )
        asked = _asked(enrol)
        _check_limits(asked, token)
        # A repeated request costs no use: after a lost answer the same key comes again for the same
        # agent.
        again = self._has_used(token, asked)
        if not again and token.used >= token.uses:
            used = f"join token {token.id!r} is used up: it was for {_times(token.uses)}"
            raise Refused(Refusal.BAD_TOKEN, f"{used}; create a new one (rtunnel pki token create)")
        revokes = not again and self._takes_agent_id(enrol, asked, token)
        return _Due(asked, token.lifetime, token, again, token.id, revokes)

    def _takes_agent_id(self, enrol: Enrol, asked: Request, token: TokenRecord) -> bool:
        """Return whether the token takes the agent_id over from another agent. Raises Refused.

        An agent_id belongs to the holder of a certificate in force for it. The same token may give
        it again, to a host that has lost its identity directory. Another token needs an agent that
        also proves its present certificate, or must be made for it (`take_over`). Even then it
        takes an agent_id only from an agent all of whose addresses are in the token's networks.
        """
        others = [item for item in self.directory.in_force(asked.subject) if item.token != token.id]
        if not others or self._is_same_agent(enrol, asked):
            return False
        last = max(others, key=lambda item: item.ends)
        by = f"by join token {last.token!r}" if last.token else "issued by hand, or by a token that is not recorded"
        has = f"{asked.subject} has a certificate in force until {utc(last.ends)}, {by}"
        foreign = _outside([address for item in others for address in item.addresses], token)
        if token.take_over and not foreign:
            return True
        if token.take_over:
            fix = f"join token {token.id!r} can't take it over, because it does not allow {', '.join(foreign[:4])}"
        else:
            fix = (
                "choose another agent.agent_id; if this is the same host, set up anew, revoke its old certificate "
                f"(rtunnel pki revoke {asked.subject}) or give it a token of rtunnel pki token create --take-over"
            )
        raise Refused(Refusal.AGENT_ID_TAKEN, f"{has}: {fix}")

    def _is_same_agent(self, enrol: Enrol, asked: Request) -> bool:
        """Return whether a request with a token also proves the subject's present certificate."""
        if not enrol.certificate:
            return False
        try:
            return self._present(enrol).subject == asked.subject
        except Refused:
            return False

    def _has_used(self, token: TokenRecord, asked: Request) -> bool:
        items = self.directory.store.issued_for(key_hash(asked.public_key))
        return any(item.token == token.id and item.subject == asked.subject for item in items)

    def _renewal(self, enrol: Enrol) -> _Due:
        present = self._present(enrol)
        known = self.directory.store.issued_for(key_hash(present.public_key))
        if not self._renew_unknown and not any(item.subject == present.subject for item in known):
            # The certificate may have been made with a stolen key, or after the last backup of the
            # store.
            reason = f"the certificate of {present.subject} is not recorded here: enrol with a join token"
            raise Refused(
                Refusal.BAD_CERTIFICATE,
                f"{reason} (if the store was restored from an older copy: authority.renew = all)",
            )
        asked = _asked(enrol)
        if asked.subject != present.subject:
            reason = f"{present.subject} can't renew as {asked.subject}: another identity needs a join token"
            raise Refused(Refusal.NOT_AUTHORISED, reason)
        if foreign := [address for address in asked.addresses if address not in present.addresses]:
            reason = f"the present certificate is not for {', '.join(foreign)}: more addresses need a join token"
            raise Refused(Refusal.NOT_AUTHORISED, reason)
        origin = next((item.token for item in known if item.subject == present.subject), "")
        return _Due(asked, present.ends - present.issued, origin=origin)

    def _present(self, enrol: Enrol) -> Identity:
        """Return the identity whose certificate and key the request proves. Raises Refused."""
        trust_store, der = self.directory.trust_store, enrol.certificate
        try:
            who = read_certificate(der)
            if trust_store.is_revoked(who):
                raise Refused(Refusal.REVOKED, f"{who.subject} is revoked: it needs a join token and another key")
            who = trust_store.verify(der, self.directory.now)
        except TrustError as error:
            raise Refused(Refusal.BAD_CERTIFICATE, f"{error}: enrol with a join token") from None
        if who.kind != "agent":
            raise Refused(Refusal.BAD_CERTIFICATE, f"{who.subject} is not an agent: only agents can renew here")
        try:
            who.public_key.verify(enrol.signature, RENEW_LABEL + enrol.request, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            reason = f"the request is not signed by the key of {who.subject}'s certificate"
            raise Refused(Refusal.BAD_CERTIFICATE, reason) from None
        return who

    def _issue(self, due: _Due) -> Granted:
        asked, token = due.asked, due.token
        held = self.directory.held_by_others(asked.subject, asked.namespace, asked.addresses)
        took_over = {item.subject for item in held.values()}
        if due.revokes:
            self.directory.revoke(asked.subject)
            took_over.add(asked.subject)
        try:
            made = self.directory.issue_agent(
                asked.agent_id, asked.public_key, namespace=asked.namespace, addresses=asked.addresses,
                seconds=due.seconds, token=due.origin, remember=token.ends if token else 0,
                take_over=token is not None and token.take_over,
            )  # fmt: skip
        except StoreFault:
            raise
        except TrustError as error:
            raise Refused(Refusal.BAD_REQUEST, str(error)) from None
        if token is not None and not due.again:
            self.directory.store.use_token(token.id)
        answer = Enrolled(made.public_bytes(serialization.Encoding.DER), self.directory.signed)
        ends = made.not_valid_after_utc.timestamp()
        return Granted(answer, asked, token.id if token else "", ends, tuple(sorted(took_over)))


def claimed(enrol: Enrol) -> Request | None:
    """Return the contents of a request, unproven, for the log of refusals; None when unreadable."""
    try:
        return read_request(load_request(enrol.request))
    except TrustError:
        return None


def _asked(enrol: Enrol) -> Request:
    try:
        return read_request(load_request(enrol.request))
    except TrustError as error:
        raise Refused(Refusal.BAD_REQUEST, str(error)) from None


def _check_limits(asked: Request, token: TokenRecord) -> None:
    if asked.namespace != token.namespace:
        reason = f"join token {token.id!r} is for namespace {token.namespace!r}, not for {asked.namespace!r}"
        raise Refused(Refusal.NOT_AUTHORISED, reason)
    if foreign := _outside(asked.addresses, token):
        reason = (
            f"join token {token.id!r} is not for {', '.join(foreign[:4])}, only for {', '.join(token.networks[:4])}"
        )
        raise Refused(Refusal.NOT_AUTHORISED, reason)


def _outside(addresses: Iterable[str], token: TokenRecord) -> list[str]:
    """Return the addresses that are in none of the token's networks."""
    networks = [ipaddress.ip_network(network) for network in token.networks]
    return [a for a in addresses if not any(ipaddress.ip_address(a) in network for network in networks)]


def _times(count: int) -> str:
    return "one agent" if count == 1 else f"{count} agents"
