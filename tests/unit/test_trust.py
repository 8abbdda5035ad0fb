"""Trust: what `pki init` makes works with TLS, keys and tokens are told apart, MACs and nonces hold."""

from __future__ import annotations

import base64
import os
import socket
import ssl
import stat
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from rtunnel.errors import TrustError
from rtunnel.trust import keys, pki, tls
from rtunnel.trust.keys import DialKeys, GatewayKey, NonceWindow, gateway_key, token_mac

SECRETS = ("ca.key", "authority.db", "broker.key", "cluster.key", "gateway.key", "join.token")
PUBLIC = ("ca.pem", "broker.pem")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trust") / "pki"
    pki.init(directory, names=["vip.example"], ips=["10.0.0.1", "fd00::1"])
    return directory


# --- pki --------------------------------------------------------------------------------------------------------------


def test_init_makes_private_files(tmp_path: Path) -> None:
    """The folder is for its owner only, secrets have mode 0600 whatever the umask."""
    before = os.umask(0)
    try:
        listed = pki.init(tmp_path / "a" / "pki")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "pki").stat().st_mode) == 0o700
    modes = {item.path.name: stat.S_IMODE(item.path.stat().st_mode) for item in listed}
    assert modes == dict.fromkeys(SECRETS, 384) | dict.fromkeys(PUBLIC, 420)


@pytest.mark.parametrize("name", [*SECRETS, *PUBLIC])
def test_init_never_overwrites(tmp_path: Path, name: str) -> None:
    """One file that is there already stops it, is left as it is, and nothing else is left behind."""
    (tmp_path / name).write_text("precious")
    with pytest.raises(TrustError, match=rf"{name}: exists, and is not overwritten"):
        pki.init(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "precious"}


def test_init_where_nothing_can_be_written(tmp_path: Path) -> None:
    """A folder that can't be made is told."""
    (tmp_path / "file").touch()
    with pytest.raises(TrustError, match="can't be written: Not a directory"):
        pki.init(tmp_path / "file" / "pki")


def test_certificates_say_what_they_are_for(made: Path) -> None:
    """CA: ten years, signs certificates only. Broker: a year, a server, all its names. Both dated an hour back."""
    ca = x509.load_pem_x509_certificate((made / "ca.pem").read_bytes())
    broker = x509.load_pem_x509_certificate((made / "broker.pem").read_bytes())
    now = datetime.now(UTC)
    for certificate, days in ((ca, 3650), (broker, 365)):
        assert abs(certificate.not_valid_before_utc - (now - timedelta(hours=1))) < timedelta(minutes=5)
        assert abs(certificate.not_valid_after_utc - (now + timedelta(days=days))) < timedelta(minutes=5)
    constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical and constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    assert ca.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    assert not broker.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not broker.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    usage = broker.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    names = broker.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["broker.rtunnel", "vip.example"]
    assert list(map(str, names.get_values_for_type(x509.IPAddress))) == ["10.0.0.1", "fd00::1"]
    assert ca.serial_number != broker.serial_number


def test_names_that_cant_stand_in_a_certificate(tmp_path: Path) -> None:
    """A wrong address is refused before anything is written."""
    with pytest.raises(TrustError, match="can't stand in a certificate"):
        pki.init(tmp_path / "pki", ips=["vip"])
    assert not (tmp_path / "pki").exists()


def test_another_broker_certificate(made: Path) -> None:
    """issue_broker makes one more from the same CA, and never overwrites."""
    pki.issue_broker(made, "broker-2", names=["b2.example"])
    handshake(
        tls.server_context(made / "broker-2.pem", made / "broker-2.key"),
        tls.client_context(made / "ca.pem"),
        "b2.example",
    )
    with pytest.raises(TrustError, match=r"broker-2\.pem: exists"):
        pki.issue_broker(made, "broker-2")
    with pytest.raises(TrustError, match="can't be a file's name"):
        pki.issue_broker(made, "../broker")


def test_issuing_without_a_ca(tmp_path: Path, made: Path) -> None:
    """A missing CA, and a key of another CA, are told."""
    with pytest.raises(TrustError, match=r"authority\.db: can't be opened"):
        pki.issue_broker(tmp_path, "b")
    (tmp_path / "authority.db").write_bytes((made / "authority.db").read_bytes())
    (tmp_path / "ca.key").write_bytes((made / "broker.key").read_bytes())
    with pytest.raises(TrustError, match="is not the key of"):
        pki.issue_broker(tmp_path, "b")


# --- tls --------------------------------------------------------------------------------------------------------------


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> tuple[ssl.SSLSocket, bytes]:
    """The client's end after a handshake over a socket pair, and one byte that the server said."""
    left, right = socket.socketpair()

    def serve() -> None:
        try:
            with server.wrap_socket(left, server_side=True) as link:
                link.sendall(b"!")
        except OSError:
            left.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        link = client.wrap_socket(right, server_hostname=name)
        with link:
            said = link.recv(1)
            assert link.version() == "TLSv1.3"
            assert link.selected_alpn_protocol() == "rtunnel/1"
            assert link.getpeercert(True) is not None
        return link, said
    finally:
        right.close()
        thread.join(10)


@pytest.fixture
def server(made: Path) -> ssl.SSLContext:
    return tls.server_context(made / "broker.pem", made / "broker.key")


@pytest.fixture
def client(made: Path) -> ssl.SSLContext:
    return tls.client_context(made / "ca.pem")


@pytest.mark.parametrize("name", ["broker.rtunnel", "vip.example", "10.0.0.1", "fd00::1"])
def test_agents_accept_the_brokers_names(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> None:
    """TLS 1.3 with our ALPN, under every name and address of the certificate, by OpenSSL's strict rules."""
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    link, said = handshake(server, client, name)
    assert said == b"!"
    assert link.session is None or not link.session.has_ticket


def test_agents_refuse_other_names(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """A name that is not in the certificate is refused."""
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(server, client, "evil.example")


def test_agents_refuse_other_cas(server: ssl.SSLContext, tmp_path: Path) -> None:
    """A broker of another CA is refused."""
    pki.init(tmp_path / "other")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, tls.client_context(tmp_path / "other" / "ca.pem"), "broker.rtunnel")


def test_older_tls_is_refused(server: ssl.SSLContext) -> None:
    """TLS 1.2 is not spoken."""
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname = False
    old.verify_mode = ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        handshake(server, old, "broker.rtunnel")


def test_the_fingerprint_is_the_same_on_both_sides(made: Path, server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """What the server computes from its file is what the client computes from the handshake."""
    left, right = socket.socketpair()
    thread = threading.Thread(target=lambda: server.wrap_socket(left, server_side=True).close())
    thread.start()
    with client.wrap_socket(right, server_hostname="broker.rtunnel") as link:
        seen = link.getpeercert(True)
    thread.join(10)
    assert seen is not None
    own = tls.certificate_fingerprint(tls.certificate_der(made / "broker.pem"))
    assert tls.certificate_fingerprint(seen) == own
    assert len(own) == 32


def test_days_left(made: Path) -> None:
    """How long a certificate is good."""
    assert 364 < tls.days_left(made / "broker.pem") <= 365
    assert tls.days_left(made / "broker.pem", datetime.now(UTC) + timedelta(days=400)) < 0


@pytest.fixture
def files(tmp_path: Path, made: Path) -> Iterator[Path]:
    """A folder with files to mix up."""
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "empty").touch()
    (tmp_path / "garbage").write_bytes(os.urandom(500))
    loaded = serialization.load_pem_private_key((made / "broker.key").read_bytes(), None)
    (tmp_path / "encrypted.key").write_bytes(
        loaded.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    yield tmp_path


@pytest.mark.parametrize(
    ("certificate", "key", "reason"),
    [
        ("none", "broker.key", "none: can't be read: No such file"),
        ("broker.pem", "none", "none: can't be read: No such file"),
        ("broker.pem", "ca.key", "ca.key: is not the key of the certificate in"),
        ("broker.key", "broker.key", "broker.key: has no PEM certificate"),
        ("broker.pem", "broker.pem", "broker.pem: has no PEM private key"),
        ("empty", "broker.key", "empty: has no PEM certificate"),
        ("garbage", "broker.key", "garbage: has no PEM certificate"),
        ("broker.pem", "garbage", "garbage: has no PEM private key"),
        ("broker.pem", "encrypted.key", "encrypted.key: is encrypted with a passphrase"),
    ],
)
def test_wrong_server_files_are_named(files: Path, certificate: str, key: str, reason: str) -> None:
    """The file at fault is named with its reason; no passphrase is asked for on the terminal."""
    with pytest.raises(TrustError) as caught:
        tls.server_context(files / certificate, files / key)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("ca", "reason"),
    [
        ("none", "can't be read"),
        ("empty", "has no PEM certificate"),
        ("ca.key", "has no PEM certificate"),
        ("garbage", "has no PEM certificate"),
        ("broker.pem", "has no CA certificate"),
    ],
)
def test_wrong_ca_files_are_named(files: Path, ca: str, reason: str) -> None:
    """What is not a CA certificate is refused."""
    with pytest.raises(TrustError) as caught:
        tls.client_context(files / ca)
    assert f"{files / ca}: {reason}" in str(caught.value)


# --- keys -------------------------------------------------------------------------------------------------------------


def test_made_files_load(made: Path) -> None:
    """The keys and the token that init makes can be read, and the gateway's key is of the cluster's."""
    (cluster,) = keys.load_cluster_keys(made / "cluster.key")
    key = keys.load_gateway_key(made / "gateway.key")
    assert len(cluster) == 32 and key == gateway_key(cluster, key.id) and key.id.startswith("gateway-")
    token = keys.load_token(made / "join.token")
    assert len(token.secret) == 32
    assert keys.load_tokens(made / "join.token") == {token.id: token.secret}


def test_a_brokers_file_has_several_tokens(tmp_path: Path) -> None:
    """A broker reads all tokens of a file, with comments and empty lines; an agent wants exactly one."""
    tokens = [keys.new_token("web"), keys.new_token("db"), keys.new_token()]
    path = tmp_path / "tokens"
    path.write_text("# all departments\n\n" + "".join(f"  {token.line()}\r\n" for token in tokens))
    assert keys.load_tokens(path) == {token.id: token.secret for token in tokens}
    with pytest.raises(TrustError, match="has 3 tokens"):
        keys.load_token(path)


def test_secrets_are_not_shown() -> None:
    """The repr of a token, or of a gateway's key, has its id only."""
    assert repr(keys.new_token("web")) == "Token(id='web')"
    assert repr(gateway_key(bytes(32), "g1")) == "GatewayKey(id='g1')"


def test_token_ids_are_checked() -> None:
    """An id that would break the file's format is refused."""
    for bad in ("a.b", "a b", "x" * 65, "ü"):
        with pytest.raises(ValueError, match="can't be a token's id"):
            keys.new_token(bad)


CLUSTER_LINE = keys.cluster_key_line(bytes(range(32)))
GATEWAY_LINE = gateway_key(bytes(range(32)), "g1-ab12").line()
TOKEN_LINE = keys.Token("web", bytes(range(200, 232))).line()
SHORT = base64.b64encode(b"short").decode()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        ("# nothing\n\n", "is empty"),
        (TOKEN_LINE, ":1: is not a cluster key (it is a join token)"),
        ("\n-----BEGIN CERTIFICATE-----", ":2: is not a cluster key (it is a PEM file)"),
        ("rtunnel-cluster-key-2 AAAA", "of another version of rtunnel"),
        ("hunter2", "is not a cluster key"),
        ("rtunnel-cluster-key-1", "0 bytes instead of 32"),
        ("rtunnel-cluster-key-1 !!!!", "it is not base64"),
        (f"rtunnel-cluster-key-1 {SHORT}", "5 bytes instead of 32"),
        (f"{CLUSTER_LINE}\n" * 3, "has 3 keys"),
        (f"{CLUSTER_LINE}\n{GATEWAY_LINE}", ":2: is not a cluster key (it is a gateway's key)"),
        ("ключ", "is not a key or token file"),
    ],
)
def test_wrong_cluster_keys_are_told(tmp_path: Path, text: str, reason: str) -> None:
    """What is wrong with a cluster key file is said, with its line, and nothing of its content."""
    path = tmp_path / "cluster.key"
    path.write_text(text)
    with pytest.raises(TrustError) as caught:
        keys.load_cluster_keys(path)
    told = str(caught.value)
    assert told.startswith(str(path)) and reason in told
    assert "hunter2" not in told and TOKEN_LINE not in told


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        (CLUSTER_LINE, ":1: is not a gateway's key (it is a cluster key)"),
        ("rtunnel-gateway-key-2 g1 AAAA", "of another version of rtunnel"),
        ("rtunnel-gateway-key-1 g1", "is not rtunnel-gateway-key-1 <id> <key>"),
        ("rtunnel-gateway-key-1 g/1 AAAA", "is not rtunnel-gateway-key-1 <id> <key>"),
        (f"rtunnel-gateway-key-1 g1 {SHORT}", "5 bytes instead of 32"),
        ("rtunnel-gateway-key-1 g1 !!!!", "it is not base64"),
        (f"{GATEWAY_LINE}\n{GATEWAY_LINE}", "has 2 lines"),
    ],
)
def test_wrong_gateway_keys_are_told(tmp_path: Path, text: str, reason: str) -> None:
    """What is wrong with a gateway's key file is said, and nothing of its secret."""
    path = tmp_path / "gateway.key"
    path.write_text(text)
    with pytest.raises(TrustError) as caught:
        keys.load_gateway_key(path)
    told = str(caught.value)
    assert told.startswith(str(path)) and reason in told
    assert GATEWAY_LINE[-20:] not in told and CLUSTER_LINE[-20:] not in told


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        (CLUSTER_LINE, ":1: is not a join token (it is a cluster key)"),
        ("rtunnel-token-2.a.b", "of another version"),
        ("rtunnel-token-1.web", "is not rtunnel-token-1.<id>.<secret>"),
        ("rtunnel-token-1.a b.AAAA", "is not rtunnel-token-1.<id>.<secret>"),
        ("rtunnel-token-1.web.AAAA", "3 bytes instead of 32"),
        ("rtunnel-token-1.web.A", "it is not base64"),
        (f"{TOKEN_LINE}\n{TOKEN_LINE}", ":2: is a second token with the id web"),
        (TOKEN_LINE + "+", "the secret is damaged"),
    ],
)
def test_wrong_tokens_are_told(tmp_path: Path, text: str, reason: str) -> None:
    """What is wrong with a token file is said, with its line."""
    path = tmp_path / "join.token"
    path.write_text(text)
    with pytest.raises(TrustError) as caught:
        keys.load_tokens(path)
    assert reason in str(caught.value)
    assert TOKEN_LINE[-20:] not in str(caught.value)


def test_missing_and_odd_files(tmp_path: Path) -> None:
    """A missing file, a folder and binary data are told as such."""
    with pytest.raises(TrustError, match="can't be read: No such file"):
        keys.load_cluster_keys(tmp_path / "none")
    with pytest.raises(TrustError, match="can't be read: Is a directory"):
        keys.load_tokens(tmp_path)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    with pytest.raises(TrustError, match="it is binary"):
        keys.load_tokens(tmp_path / "binary")


# --- MACs and nonces --------------------------------------------------------------------------------------------------


def test_dials_are_signed() -> None:
    """A MAC fits its body, its key and that key's id only, in its whole length only."""
    cluster = b"k" * 32
    key, keyring = gateway_key(cluster, "g1"), DialKeys([cluster])
    mac = key.sign(b"body")
    assert len(mac) == 32
    for _ in range(2):  # derived, then remembered
        assert keyring.verify("g1", b"body", mac)
        assert not keyring.verify("g1", b"Body", mac)
        assert not keyring.verify("g1", b"body", mac[:-1])
        assert not keyring.verify("g1", b"body", b"")
        assert not keyring.verify("g2", b"body", mac)
        assert not keyring.verify("", b"body", mac)
    assert not DialKeys([b"K" * 32]).verify("g1", b"body", mac)
    assert not keyring.verify("g1", b"body", GatewayKey("g1", cluster).sign(b"body"))


def test_the_cluster_key_can_be_rotated(tmp_path: Path) -> None:
    """With two keys in the file gateways of both are known; new ones are made from the first."""
    pki.init(tmp_path / "pki")
    path = tmp_path / "pki" / "cluster.key"
    before = keys.load_gateway_key(tmp_path / "pki" / "gateway.key")
    path.write_text(keys.cluster_key_line(keys.new_cluster_key()) + "\n" + path.read_text())
    pki.issue_gateway(tmp_path / "pki", "gw2")
    after = keys.load_gateway_key(tmp_path / "pki" / "gw2.key")
    both = keys.load_cluster_keys(path)
    for key in (before, after):
        assert DialKeys(both).verify(key.id, b"body", key.sign(b"body"))
    assert not DialKeys(both[:1]).verify(before.id, b"body", before.sign(b"body"))
    assert DialKeys(both[:1]).verify(after.id, b"body", after.sign(b"body"))


def test_made_up_ids_fill_nothing() -> None:
    """Only keys that have fitted are remembered."""
    cluster = bytes(32)
    keyring = DialKeys([cluster])
    for number in range(100):
        assert not keyring.verify(f"g{number}", b"body", bytes(32))
    assert not keyring._known
    key = gateway_key(cluster, "g1")
    assert keyring.verify("g1", b"body", key.sign(b"body")) and list(keyring._known) == ["g1"]


def test_a_gateways_key_has_an_id_of_its_own(made: Path, tmp_path: Path) -> None:
    """The name and a random part: who renews gets another id, and a file is never overwritten."""
    pki.issue_gateway(made, "paris")
    first = keys.load_gateway_key(made / "paris.key")
    (made / "paris.key").rename(tmp_path / "old.key")
    pki.issue_gateway(made, "paris")
    second = keys.load_gateway_key(made / "paris.key")
    assert first.id != second.id and first.id.startswith("paris-") and second.id.startswith("paris-")
    assert (made / "paris.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(TrustError, match=r"paris\.key: exists"):
        pki.issue_gateway(made, "paris")
    with pytest.raises(TrustError, match="can't be a file's name"):
        pki.issue_gateway(made, "../paris")
    with pytest.raises(TrustError, match="can't be the id of a gateway's key"):
        pki.issue_gateway(made, "pâris")


def test_a_known_mac() -> None:
    """RFC 4231's case of a short text, under a key of our length: the function is HMAC-SHA256."""
    key = GatewayKey("g1", b"\x0b" * 20 + b"\x00" * 12)
    assert key.sign(b"Hi There").hex() == "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"


@given(st.lists(st.binary(max_size=5), max_size=4), st.lists(st.binary(max_size=5), max_size=4))
def test_token_macs_keep_parts_apart(one: list[bytes], other: list[bytes]) -> None:
    """Two lists of parts have the same MAC only when they are the same list."""
    same = token_mac(b"s", b"label", *one) == token_mac(b"s", b"label", *other)
    assert same == (one == other)


def test_token_macs_depend_on_label_and_secret() -> None:
    """A proof of one direction is none of the other."""
    assert (
        len({token_mac(b"s", b"agent", b"x"), token_mac(b"s", b"broker", b"x"), token_mac(b"t", b"agent", b"x")}) == 3
    )


def test_nonces_are_fresh_once() -> None:
    """A nonce is refused for the whole window after its use, and forgotten after twice the window."""
    window = NonceWindow(60)
    assert window.fresh(b"a", 0)
    assert not window.fresh(b"a", 0)
    assert window.fresh(b"b", 59)
    assert not window.fresh(b"a", 60)
    assert not window.fresh(b"b", 118.9)
    assert window.fresh(b"a", 121)
    assert window.fresh(b"b", 500)
    assert len(window) == 1


def test_the_window_has_a_cap() -> None:
    """A full generation refuses everything until it ends, and forgets nothing."""
    window = NonceWindow(60, cap=3)
    assert all(window.fresh(bytes([number]), 0) for number in range(3))
    assert window.full
    assert not window.fresh(b"new", 1)
    assert not window.fresh(bytes([0]), 59)
    assert window.fresh(b"new", 60)
    assert not window.fresh(bytes([0]), 60)
    assert len(window) == 4


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 30)), max_size=60))
def test_no_nonce_passes_twice_within_the_window(uses: list[tuple[int, float]]) -> None:
    """Whatever the times, two uses within the window are never both fresh; long after, a nonce is."""
    window, now, last = NonceWindow(10), 0.0, dict[int, float]()
    for number, pause in uses:
        now += pause
        if window.fresh(bytes([number]), now):
            assert now - last.get(number, -1e9) >= 10
            last[number] = now
        else:
            assert now - last[number] <= 20
