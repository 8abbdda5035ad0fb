"""Certificates say who somebody is; trust lists say whom to believe."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from rtunnel.errors import TrustError
from rtunnel.trust import identity, pki
from rtunnel.trust.certificates import pem
from rtunnel.trust.identity import (
    TrustList,
    TrustStore,
    ca_id,
    is_session_proof,
    load_private_key,
    prove_session,
    sign_list,
    void_cas,
)
from rtunnel.trust.proof import ACCEPTED as SAID
from rtunnel.trust.proof import Exchange, is_signed, sign
from rtunnel.trust.tls import certificate_der
from rtunnel.wire.messages import PAIR_ID_BYTES


def made(directory: Path, name: str = "a1", **changes: Any) -> Path:
    """A CA, and an agent's certificate from it."""
    if not (directory / "ca.pem").exists():
        pki.init(directory)
    fields: dict[str, Any] = {"agent_id": "höst 7/x", "namespace": "blue", "addresses": ["10.1.0.7", "fd00::7"]}
    pki.issue_agent(directory, name, **(fields | changes))
    return directory / f"{name}.pem"


def ca_of(directory: Path) -> tuple[x509.Certificate, identity.PrivateKey]:
    """Of a directory of `pki.init`."""
    certificate = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
    return certificate, load_private_key(directory / "ca.key")


def a_list(*cas: tuple[x509.Certificate, identity.PrivateKey], number: int = 1, **fields: Any) -> TrustList:
    return TrustList(number, 1, [ca.public_bytes(serialization.Encoding.DER) for ca, _ in cas], **fields)


def test_a_certificate_says_who_and_where(tmp_path: Path) -> None:
    """Words with any characters come back as they were, addresses in their one spelling."""
    der = certificate_der(made(tmp_path / "ca", addresses=["10.1.0.7", "FD00:0::7"]))
    who = TrustStore((tmp_path / "ca" / "ca.pem").read_bytes()).verify(der)
    assert (who.kind, who.namespace, who.name) == ("agent", "blue", "höst 7/x")
    assert who.addresses == {"10.1.0.7", "fd00::7"}
    assert who.subject == "agent/blue/höst 7/x"


def test_another_ca_makes_no_identity(tmp_path: Path) -> None:
    der = certificate_der(made(tmp_path / "theirs"))
    pki.init(tmp_path / "ours")
    with pytest.raises(TrustError, match="not from a CA in force"):
        TrustStore((tmp_path / "ours" / "ca.pem").read_bytes()).verify(der)


def test_time_counts_for_one_that_was_seen_before(tmp_path: Path) -> None:
    der = certificate_der(made(tmp_path, days=1))
    trust_store = TrustStore((tmp_path / "ca.pem").read_bytes())
    who = trust_store.verify(der)
    with pytest.raises(TrustError, match="has expired"):
        trust_store.verify(der, now=lambda: who.ends)
    with pytest.raises(TrustError, match="not valid yet"):
        trust_store.verify(der, now=lambda: who.issued - 3601)


def test_a_list_revokes_what_was_issued_until_then(tmp_path: Path) -> None:
    trust_store = TrustStore((made(tmp_path / "ca").parent / "ca.pem").read_bytes())
    der = certificate_der(tmp_path / "ca" / "a1.pem")
    who = trust_store.verify(der)
    ca = ca_of(tmp_path / "ca")
    assert trust_store.take(sign_list(a_list(ca, number=2, revoked={who.subject: int(who.issued) - 1}), [ca]))
    assert trust_store.verify(der) == who
    assert trust_store.take(sign_list(a_list(ca, number=3, revoked={who.subject: int(who.issued)}), [ca]))
    with pytest.raises(TrustError, match="is revoked"):
        trust_store.verify(der)
    assert not trust_store.take(sign_list(a_list(ca, number=2), [ca])), "an older list came back"
    assert trust_store.is_revoked(who)


def test_lists_hand_on_from_ca_to_ca(tmp_path: Path) -> None:
    """Old alone, both, new alone: who has seen the middle one follows; who has not believes nobody new."""
    for name in ("old", "new"):
        made(tmp_path / name)
    old, new = ca_of(tmp_path / "old"), ca_of(tmp_path / "new")
    both, last = a_list(old, new, number=2), a_list(new, number=3)
    pem = (tmp_path / "old" / "ca.pem").read_bytes()
    late, follower = TrustStore(pem), TrustStore(pem)
    assert follower.take(sign_list(both, [old, new]))
    for name in ("old", "new"):
        follower.verify(certificate_der(tmp_path / name / "a1.pem"))
    assert follower.take(sign_list(last, [new]))
    with pytest.raises(TrustError):
        follower.verify(certificate_der(tmp_path / "old" / "a1.pem"))
    with pytest.raises(TrustError, match="not signed by a CA in force"):
        late.take(sign_list(last, [new]))
    assert late.take(sign_list(last, [new, old]))


def test_a_ca_that_left_is_void_only_where_that_is_said(tmp_path: Path) -> None:
    """What was verified before is of a CA in force or not, and void or not: two questions."""
    for name in ("old", "new"):
        made(tmp_path / name)
    old, new = ca_of(tmp_path / "old"), ca_of(tmp_path / "new")
    trust_store = TrustStore((tmp_path / "old" / "ca.pem").read_bytes())
    who = trust_store.verify(certificate_der(tmp_path / "old" / "a1.pem"))
    broker = certificate_der(tmp_path / "old" / "broker.pem")
    trust_store.take(sign_list(a_list(old, new, number=2), [old, new]))
    assert trust_store.in_force(who)
    trust_store.take(sign_list(a_list(new, number=3), [new]))
    assert not trust_store.in_force(who) and not trust_store.is_void(who) and not trust_store.fault_of(broker)
    trust_store.take(sign_list(a_list(new, number=4, void=[ca_id(old[0])]), [new]))
    assert trust_store.is_void(who)
    assert trust_store.fault_of(broker) == "the certificate of broker/broker is from a CA that is void"
    assert not trust_store.fault_of(certificate_der(tmp_path / "new" / "broker.pem"))


def test_a_ca_whose_own_certificate_is_renewed(tmp_path: Path) -> None:
    """Another certificate for the same key: whoever has the one or the other is from a CA in force."""
    der = certificate_der(made(tmp_path))
    old, key = ca_of(tmp_path)
    builder = x509.CertificateBuilder(old.issuer, old.subject, old.public_key(), 7, extensions=list(old.extensions))
    begin, end = old.not_valid_before_utc, old.not_valid_after_utc + timedelta(days=1)
    new = builder.not_valid_before(begin).not_valid_after(end).sign(key, hashes.SHA256())
    first, second = pem(old), pem(new)
    trust_store = TrustStore(first + second)
    assert trust_store.pem.encode() == first + second
    who = trust_store.verify(der)
    trust_store.begin_again(second)
    assert trust_store.in_force(who) and not trust_store.is_void(who) and trust_store.verify(der) == who


def test_cas_that_are_replaced_by_hand_without_handing_over_are_void(tmp_path: Path) -> None:
    for name in ("old", "new"):
        made(tmp_path / name)
    old, new = ((tmp_path / name / "ca.pem").read_bytes() for name in ("old", "new"))
    der = certificate_der(tmp_path / "old" / "a1.pem")
    at_once, in_order = TrustStore(old), TrustStore(old)
    who = at_once.verify(der)
    at_once.begin_again(new)
    assert at_once.is_void(who)
    in_order.begin_again(old + new)
    in_order.begin_again(new)
    assert not in_order.is_void(who) and not in_order.in_force(who)
    behind = TrustStore(old)  # the list that it has says nothing of the new CA yet, the file does
    behind.take(sign_list(a_list(ca_of(tmp_path / "old")), [ca_of(tmp_path / "old")]))
    behind.begin_again(old + new)
    assert behind.pem.encode() == old
    behind.begin_again(new)
    assert not behind.is_void(who) and not behind.in_force(who)


def test_a_ca_file_that_is_written_again_brings_no_void_ca_back(tmp_path: Path) -> None:
    """A ConfigMap that is put again as it was, after the key in it was stolen and the list has gone on without it."""
    for name in ("old", "new"):
        made(tmp_path / name)
    old, new = ca_of(tmp_path / "old"), ca_of(tmp_path / "new")
    thief = certificate_der(tmp_path / "old" / "a1.pem")
    honest = certificate_der(tmp_path / "new" / "a1.pem")
    file = (tmp_path / "old" / "ca.pem").read_bytes()
    trust_store = TrustStore(file)
    trust_store.take(sign_list(TrustList(1, 1, [der(old), der(new)]), [old, new]))
    trust_store.take(sign_list(TrustList(2, 2, [der(new)], void=[ca_id(old[0])]), [new]))
    for _ in range(2):
        assert trust_store.verify(honest)
        with pytest.raises(TrustError, match="not from a CA in force"):
            trust_store.verify(thief)
        trust_store.begin_again(file)
        assert trust_store.number == 2
    with pytest.raises(TrustError, match=r"ca\.pem: has only void CAs.*newest ca\.pem"):
        trust_store.begin_again(file + b"\n" + pem(renewed(old)), "ca.pem")
    assert trust_store.verify(honest) and trust_store.number == 2


def test_an_agents_own_list_says_which_cas_were_stolen(tmp_path: Path) -> None:
    """Also when the file of CAs is so old that the list can't be taken any more."""
    for name in ("old", "new"):
        made(tmp_path / name)
    old, new = ca_of(tmp_path / "old"), ca_of(tmp_path / "new")
    kept = sign_list(TrustList(2, 2, [der(new)], void=[ca_id(old[0])]), [new])
    trust_store = TrustStore(pem(old[0]))
    with pytest.raises(TrustError, match="not signed by a CA in force"):
        trust_store.take(kept)
    assert void_cas(kept) == {ca_id(old[0])} and not void_cas(b"no list")
    with pytest.raises(TrustError, match=r"^ca\.pem: has only void CAs"):
        trust_store.must_not_be(void_cas(kept), "ca.pem")
    TrustStore(pem(old[0]) + pem(new[0])).must_not_be(void_cas(kept), "ca.pem")


def der(ca: tuple[x509.Certificate, identity.PrivateKey]) -> bytes:
    return ca[0].public_bytes(serialization.Encoding.DER)


def renewed(ca: tuple[x509.Certificate, identity.PrivateKey]) -> x509.Certificate:
    """Another certificate for the same key."""
    old, key = ca
    builder = x509.CertificateBuilder(old.issuer, old.subject, old.public_key(), 8, extensions=list(old.extensions))
    end = old.not_valid_after_utc + timedelta(days=2)
    return builder.not_valid_before(old.not_valid_before_utc).not_valid_after(end).sign(key, hashes.SHA256())


def test_a_session_is_proved_for_one_link_only(tmp_path: Path) -> None:
    key = load_private_key(made(tmp_path).parent / "a1.key")
    proof = prove_session(key, "b1", 7, b"broker's")
    assert is_session_proof(key.public_key(), "b1", 7, b"broker's", proof)
    for other in (("b2", 7, b"broker's"), ("b1", 8, b"broker's"), ("b1", 7, b"another")):
        assert not is_session_proof(key.public_key(), *other, proof)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", b"\x82\xa4body\xc4\x00\xaasignatures\x90"])
def test_what_is_no_list_is_named_so(tmp_path: Path, data: bytes) -> None:
    pki.init(tmp_path / "ca")
    with pytest.raises(TrustError, match="is not a trust list"):
        TrustStore((tmp_path / "ca" / "ca.pem").read_bytes()).take(data)


def test_a_changed_list_is_not_signed(tmp_path: Path) -> None:
    pki.init(tmp_path / "ca")
    ca = ca_of(tmp_path / "ca")
    data = sign_list(a_list(ca, revoked={"agent/a/b": 1}), [ca])
    changed = data.replace(b"agent/a/b", b"agent/a/c")
    assert changed != data
    with pytest.raises(TrustError, match="not signed"):
        TrustStore((tmp_path / "ca" / "ca.pem").read_bytes()).take(changed)


def test_a_proof_is_of_one_key_and_one_body(tmp_path: Path) -> None:
    key = load_private_key(made(tmp_path).with_suffix(".key"))
    other = load_private_key(made(tmp_path, "a2").with_suffix(".key"))
    own, foreign = bytes(32), bytes(31) + b"x"
    proof = sign(key, SAID, own, b"body")
    assert is_signed(key.public_key(), SAID, own, b"body", proof)
    assert not is_signed(key.public_key(), b"no", own, b"body", proof)
    assert not is_signed(key.public_key(), SAID, own, b"bodx", proof)
    assert not is_signed(key.public_key(), SAID, foreign, b"body", proof)
    assert not is_signed(other.public_key(), SAID, own, b"body", proof)
    assert not is_signed(key.public_key(), SAID, own, b"body", b"")


def test_the_key_of_a_pair_is_of_two_ends_and_one_certificate() -> None:
    """Both ends make the same of it; another gateway, agent or certificate gives another key, and another id."""
    gateway, agent, third = Exchange(), Exchange(), Exchange()
    pair, same = gateway.with_agent(agent.public, b"c"), agent.with_gateway(gateway.public, b"c")
    others = [
        gateway.with_agent(third.public, b"c"),
        third.with_agent(agent.public, b"c"),
        gateway.with_agent(agent.public, b"d"),
        agent.with_agent(gateway.public, b"c"),
    ]
    assert pair.id == same.id and len(pair.id) == PAIR_ID_BYTES
    assert len({pair.id, *(other.id for other in others)}) == 5
    mac = same.mac(SAID, b"body")
    assert pair.is_proof(SAID, b"body", mac)
    assert not any(other.is_proof(SAID, b"body", mac) for other in others)
    for said, body, bad in (
        (b"no", b"body", mac),
        (SAID, b"bodx", mac),
        (SAID, b"body", mac[:-1]),
        (SAID, b"body", b""),
    ):
        assert not pair.is_proof(said, body, bad)


@pytest.mark.parametrize(
    "part", [b"", bytes(31), bytes(33), bytes(32), b"\x01" + bytes(31), bytes.fromhex("ec" + "ff" * 30 + "7f")]
)
def test_a_part_that_makes_no_key_is_refused(part: bytes) -> None:
    """Of another length, and points of low order, with which everybody would get the same key."""
    for make in (Exchange().with_agent, Exchange().with_gateway):
        with pytest.raises(TrustError, match="not a usable"):
            make(part, b"c")
