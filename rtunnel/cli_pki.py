"""The command `rtunnel pki`: keys, certificates, tokens and revocations of a cluster."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from rtunnel.config import BadValue, canonical_ip, check_network, check_word
from rtunnel.console import Failure, plural, print_json, print_table, report_errors
from rtunnel.errors import EXIT_USAGE, TrustError
from rtunnel.logs import printable
from rtunnel.trust import certificates, keys, pki
from rtunnel.trust.certificates import DAY, read_request, requested_key
from rtunnel.trust.files import PUBLIC, SECRET, Made, replace, write_new
from rtunnel.trust.pki import Directory, open_directory, utc
from rtunnel.trust.store import TokenRecord

if TYPE_CHECKING:
    _IntParam = click.ParamType[int]
    _StrParam = click.ParamType[str]
else:
    _IntParam = _StrParam = click.ParamType  # ParamType[int] needs click 8.4

_UNITS = {"d": DAY, "h": 3600, "m": 60, "s": 1}


class _Duration(_IntParam):
    """Converts 90s, 30m, 24h or 7d to seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d{1,6})([smhd])", str(value))
        if not found or not int(found[1]):
            self.fail(f"{value!r} is not a duration: write it like 30m, 24h or 7d", param, ctx)
        return int(found[1]) * _UNITS[found[2]]


class _Checked(_StrParam):
    """Accepts what a check of the configuration accepts."""

    def __init__(self, name: str, check: Callable[[str], str]) -> None:
        self.name = name
        self._check = check

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return self._check(str(value))
        except ValueError as error:
            fix = f" ({error.fix})" if isinstance(error, BadValue) and error.fix else ""
            self.fail(f"{error}{fix}", param, ctx)


_DURATION = _Duration()
_WORD = _Checked("word", check_word)
_IP = _Checked("ip", canonical_ip)
_CIDR = _Checked("cidr", check_network)
_FOLDER = click.Path(path_type=Path, file_okay=False)

_dir = click.option(
    "--dir",
    "directory",
    type=_FOLDER,
    default=".",
    help="The authority's directory, made by `pki init`; default: the current one.",
)
_names = click.option("--name", "names", multiple=True, help="A DNS name of the brokers' VIP; repeatable.")
_ips = click.option("--ip", "ips", type=_IP, multiple=True, help="An IP address of the brokers' VIP; repeatable.")
_namespace = click.option(
    "--namespace", type=_WORD, default="default", show_default=True, help="The agent's namespace."
)
_csr = click.option(
    "--csr",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A request file of `pki request`; its key stays on that host.",
)
_TAKE_OVER = "Also allow what is certified for another agent: addresses, and with a token its agent_id."
_take_over = click.option("--take-over", is_flag=True, help=_TAKE_OVER)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON; times are seconds since 1970.")
_into = click.option("--into", type=_FOLDER, help="Directory for the files; default: the authority's.")


@click.group("pki")
def pki_group() -> None:
    """Create keys, certificates and tokens, and revoke them."""


@pki_group.command("init")
@click.argument("directory", type=click.Path(path_type=Path))
@_names
@_ips
def init(directory: Path, names: tuple[str, ...], ips: tuple[str, ...]) -> None:
    """Create the files of a new cluster in DIRECTORY.

    They are a CA, a certificate for brokers, the cluster's key, a gateway's key, and a shared
    token. No file is overwritten. Names and addresses are needed only where agents are given
    another `server_name` than broker.rtunnel.
    """
    with report_errors():
        _show_made(pki.init(directory, names=names, ips=ips))


@pki_group.command("shared-token")
@click.option("--id", "token_id", default="", help="The token's name in files and logs; random by default.")
def shared_token(token_id: str) -> None:
    """Print a shared token, for tests without an authority.

    Add the line to the brokers' file (`broker.join_token`), and give it to agents in a file of its
    own. Any holder may claim any address.
    """
    click.echo(_new_token(token_id).line())


# --- tokens ---------------------------------------------------------------------------------------


@pki_group.group("token")
def token_group() -> None:
    """Manage join tokens, with which agents get their first certificate."""


@token_group.command("create")
@_dir
@click.option("--id", "token_id", default="", help="The token's name in lists and logs; random by default.")
@click.option(
    "--lifetime", type=_DURATION, default="24h", show_default=True, help="Time for which the token can be used."
)
@click.option(
    "--uses", type=click.IntRange(1, 1_000_000), default=1, show_default=True, help="Number of agents that may use it."
)
@_namespace
@click.option(
    "--cidr",
    "networks",
    type=_CIDR,
    multiple=True,
    required=True,
    help="Network of addresses that these agents may have; repeatable.",
)
@click.option(
    "--cert-lifetime", type=_DURATION, default="24h", show_default=True, help="Lifetime of these agents' certificates."
)
@click.option("--file", type=click.Path(path_type=Path), help="Write the token to this new file, with mode 0600.")
@_take_over
def token_create(
    directory: Path,
    token_id: str,
    lifetime: int,
    uses: int,
    namespace: str,
    networks: tuple[str, ...],
    cert_lifetime: int,
    file: Path | None,
    take_over: bool,
) -> None:
    """Create a token, and print it once or write it to --file.

    Give the agent the line in a file (`agent.join_token`): with it the agent gets its first
    certificate.

    No agent gets an agent_id or address for which another agent has a certificate in force, unless
    --take-over is given, for a host that was installed again, or an address that has moved. This
    revokes the agent_id's older certificates.
    """
    token = _new_token(token_id)
    ends = int(time.time()) + lifetime
    record = TokenRecord(token.id, token.secret, namespace, networks, uses, 0, ends, cert_lifetime, False, take_over)
    with _changing(directory) as opened:
        opened.store.add_token(record)
        if file is not None:
            write_new(file.parent, [(file.name, SECRET, f"{token.line()}\n".encode(), "")])
    click.echo(f"{file}: token {token.id}" if file is not None else token.line())
    click.echo(
        f"The token lets {plural(uses, 'agent')} of {namespace} in {', '.join(networks)} enrol until {utc(ends)}.",
        err=True,
    )
    if take_over:
        click.echo(
            "It takes over agent_ids and addresses of other agents: revoke it when these agents have enrolled.",
            err=True,
        )


@token_group.command("list")
@_dir
@_as_json
def token_list(directory: Path, as_json: bool) -> None:
    """Show the tokens, without their secrets."""
    now = time.time()
    with report_errors(), open_directory(directory) as opened:
        tokens = opened.store.tokens()
    if as_json:
        print_json([_token_fields(token, now) for token in tokens])
        return
    columns = ("token", "state", "used", "until", "namespace", "networks", "certificates", "take over")
    print_table(columns, [_token_row(token, now) for token in tokens], keep=("token",))


@token_group.command("revoke")
@_dir
@click.argument("token_id", metavar="ID")
def token_revoke(directory: Path, token_id: str) -> None:
    """Revoke token ID.

    Certificates that agents got with it stay valid: `pki revoke` revokes those.
    """
    with _changing(directory) as opened:
        if not opened.store.revoke_token(token_id):
            raise TrustError(f"there is no token {token_id!r}: see `rtunnel pki token list`")
    click.echo(f"token {token_id} is revoked")


def _token_row(token: TokenRecord, now: float) -> tuple[str, ...]:
    used, networks = f"{token.used}/{token.uses}", ", ".join(token.networks)
    allowed = token.namespace, networks, _for(token.lifetime), "yes" if token.take_over else ""
    return token.id, _state(token, now), used, utc(token.ends), *allowed


def _token_fields(token: TokenRecord, now: float) -> dict[str, object]:
    """Return a token for --json, without its secret."""
    return {
        "id": token.id,
        "state": _state(token, now),
        "namespace": token.namespace,
        "networks": token.networks,
        "uses": token.uses,
        "used": token.used,
        "ends": token.ends,
        "lifetime": token.lifetime,
        "take_over": token.take_over,
    }


def _state(token: TokenRecord, now: float) -> str:
    if token.revoked:
        return "revoked"
    return "expired" if token.ends <= now else "used up" if token.used >= token.uses else "good"


def _new_token(token_id: str) -> keys.Token:
    try:
        return keys.new_token(token_id)
    except ValueError as error:
        raise Failure(str(error), EXIT_USAGE) from None


# --- certificates ---------------------------------------------------------------------------------


@pki_group.group("issue")
def issue_group() -> None:
    """Issue certificates, and gateways' keys, by hand."""


@issue_group.command("broker")
@_dir
@click.argument("name")
@_names
@_ips
@_csr
@_into
def issue_broker(
    directory: Path, name: str, names: tuple[str, ...], ips: tuple[str, ...], csr: Path | None, into: Path | None
) -> None:
    """Issue a certificate for broker NAME: NAME.pem and NAME.key.

    To renew one, give another directory (--into).
    """
    with report_errors():
        key = requested_key(_load_request(csr)) if csr else None
        _show_made(pki.issue_broker(directory, _word(name), names=names, ips=ips, key=key, into=into))


@issue_group.command("agent")
@_dir
@click.argument("name")
@_namespace
@click.option(
    "--address", "addresses", type=_IP, multiple=True, help="An address that the agent answers for; repeatable."
)
@click.option(
    "--days", type=click.FloatRange(0.01, 3650), default=pki.AGENT_DAYS, show_default=True, help="Lifetime in days."
)
@_csr
@_take_over
@_into
def issue_agent(
    directory: Path,
    name: str,
    namespace: str,
    addresses: tuple[str, ...],
    days: float,
    csr: Path | None,
    take_over: bool,
    into: Path | None,
) -> None:
    """Issue a certificate for agent NAME: NAME.pem and NAME.key.

    Agents with a token get certificates from the authority. This one is for `agent.certificate` and
    `agent.key`, and is not renewed. As agent.pem and agent.key in the agent's `identity` folder the
    agent renews it.
    """
    with report_errors():
        key = None
        if csr:
            asked = read_request(_load_request(csr))
            if (asked.namespace, asked.agent_id) != (namespace, name):
                raise TrustError(f"{csr}: is for {asked.subject}, not for agent/{namespace}/{name}")
            if addresses and set(addresses) != set(asked.addresses):
                raise TrustError(f"{csr}: is for {', '.join(asked.addresses)}, not for {', '.join(addresses)}")
            key, addresses = asked.public_key, asked.addresses
        if not addresses:
            raise TrustError("an agent's certificate needs an address: give --address, once for each")
        issue = partial(pki.issue_agent, directory, name, days=days, key=key, into=into, take_over=take_over)
        _show_made(issue(agent_id=_word(name), namespace=namespace, addresses=addresses))
    click.echo(f"agent/{namespace}/{name} for {', '.join(addresses)}")


@issue_group.command("gateway")
@_dir
@click.argument("name")
def issue_gateway(directory: Path, name: str) -> None:
    """Create a key for gateway NAME: NAME.key.

    Every gateway has its own key, derived from the cluster key, so that brokers need no list of
    them. `pki revoke gateway/KEY_ID` revokes it.
    """
    with report_errors():
        _show_made(pki.issue_gateway(directory, _word(name)))


@pki_group.command("request")
@click.argument("kind", type=click.Choice(["agent", "broker"]))
@click.argument("name")
@_namespace
@click.option(
    "--address", "addresses", type=_IP, multiple=True, help="An address that the agent answers for; repeatable."
)
@click.option("--into", type=_FOLDER, default=".", help="Directory for the files; default: the current one.")
def request(kind: str, name: str, namespace: str, addresses: tuple[str, ...], into: Path) -> None:
    """Create a key, and a request for its certificate.

    They are NAME.key and NAME.csr. The key stays here, on the host that will use it. Take NAME.csr
    to the authority's directory, and bring back the certificate: `pki issue KIND NAME --csr
    NAME.csr`.
    """
    with report_errors():
        pki.check_file_name(_word(name))
        key = certificates.new_key()
        made = (
            certificates.agent_request(key, name, namespace, addresses)
            if kind == "agent"
            else certificates.broker_request(key, name)
        )
        what = f"the request, for `rtunnel pki issue {kind} {name} --csr {name}.csr`"
        files = [
            (f"{name}.key", SECRET, certificates.key_pem(key), "the key, which stays on this host"),
            (f"{name}.csr", PUBLIC, certificates.pem(made), what),
        ]
        _show_made(write_new(into, files))


@pki_group.command("list")
@_dir
@_as_json
def list_issued(directory: Path, as_json: bool) -> None:
    """Show the valid certificates."""
    with report_errors(), open_directory(directory) as opened:
        in_force = {ca.number for ca in opened.cas if ca.role not in ("retired", "void")}
        revoked = opened.store.revoked_at
        items = [i for i in opened.store.issued(time.time()) if i.ca in in_force and i.issued > revoked(i.subject)]
    if as_json:
        fields = ("subject", "addresses", "issued", "ends", "ca", "token")
        print_json([{name: getattr(item, name) for name in fields} for item in items])
        return
    columns = ("subject", "addresses", "issued", "until", "ca", "token")
    rows = [(i.subject, ", ".join(i.addresses), utc(i.issued), utc(i.ends), i.ca, i.token) for i in items]
    print_table(columns, rows, keep=("subject", "token"))


def _load_request(path: Path) -> x509.CertificateSigningRequest:
    try:
        return x509.load_pem_x509_csr(path.read_bytes())
    except OSError as error:
        raise TrustError(f"{path}: can't be read: {error.strerror}") from None
    except ValueError as error:
        raise TrustError(f"{path}: is not a certificate request: {error}") from None


def _word(name: str) -> str:
    try:
        return check_word(name)
    except BadValue as error:
        raise Failure(f"{error}" + (f" ({error.fix})" if error.fix else ""), EXIT_USAGE) from None


# --- revocation -----------------------------------------------------------------------------------


@pki_group.command("revoke")
@_dir
@click.argument("subject")
@click.option("--force", is_flag=True, help="Revoke SUBJECT even if no certificate of it is known.")
def revoke(directory: Path, subject: str, force: bool) -> None:
    """Revoke the certificates or the key of SUBJECT.

    SUBJECT is agent/NAMESPACE/ID (or NAMESPACE/ID), broker/NAME or gateway/KEY_ID. Brokers and
    gateways that follow the authority end its sessions and streams within 5 seconds.
    """
    subject = _subject(subject)
    with _changing(directory) as opened:
        void = opened.revoke(subject, force=force)
        # Also tokens of expired certificates: an agent may have had several tokens.
        tokens = [opened.store.token(item.token) for item in opened.store.issued_to(subject) if item.token]
        number = opened.number
    what = "the key" if subject.startswith("gateway/") else plural(len(void), "certificate")
    click.echo(f"{printable(subject)} is revoked: {what} (trust list {number})")
    now = time.time()
    for token in {t.id: t for t in tokens if t is not None and _state(t, now) == "good"}.values():
        left, fix = plural(token.uses - token.used, "use"), f"`rtunnel pki token revoke {token.id}`"
        click.echo(f"token {token.id}, with which it enrolled, has {left} left: {fix}")


def _subject(text: str) -> str:
    parts = text.split("/")
    if len(parts) == 2 and parts[0] not in ("broker", "gateway"):
        parts = ["agent", *parts]
    count = {"agent": 3, "broker": 2, "gateway": 2}.get(parts[0])
    if len(parts) != count or not all(parts):
        raise Failure(f"{text!r} is not agent/NAMESPACE/ID, broker/NAME or gateway/KEY_ID", EXIT_USAGE)
    return "/".join(parts)


# --- the trust list, and another CA ---------------------------------------------------------------


@pki_group.command("show")
@_dir
def show(directory: Path) -> None:
    """Show the trust list that is in force."""
    with report_errors(), open_directory(directory) as opened:
        click.echo(f"trust list {opened.number}, generation {opened.generation}, {len(opened.signed)} bytes")
        for record in opened.cas:
            ca = x509.load_der_x509_certificate(record.certificate)
            fingerprint = ca.fingerprint(hashes.SHA256()).hex()[:16]
            ends = int(ca.not_valid_after_utc.timestamp())
            click.echo(f"CA {record.number}: {_ROLES[record.role]}; until {utc(ends)}, SHA-256 {fingerprint}...")
        for subject, at in sorted(opened.trust_store.revoked.items()):
            click.echo(f"revoked: {printable(subject)}, issued until {utc(at)}")


_ROLES = {
    "issuing": "in force, certificates come from it",
    "next": "in force, certificates come from it after `rotate switch`",
    "old": "in force until `rotate finish`",
    "retired": "not in force",
    "void": "not in force; it was stolen",
}


@pki_group.command("export")
@_dir
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def export(directory: Path, file: Path) -> None:
    """Write the signed trust list to FILE.

    It is for brokers and gateways that can't reach the authority (key `trust`).
    """
    with report_errors(), open_directory(directory) as opened:
        replace(file, PUBLIC, opened.signed)
        click.echo(f"{file}: trust list {opened.number}")


@pki_group.group("rotate")
def rotate_group() -> None:
    """Replace the CA, in three steps: start, switch, finish."""


@rotate_group.command("start")
@_dir
def rotate_start(directory: Path) -> None:
    """Create a new CA, which all processes learn to trust. The old CA still issues certificates."""
    with _changing(directory) as opened:
        opened.start_rotation()
    _say(
        "A new CA is in force beside the old one.",
        "Brokers and gateways that follow the authority know it in seconds, agents from their brokers.",
        f"Other processes need {directory / pki.CA_FILE}, which has both CAs, or the list of `rtunnel pki export`.",
        "Next: run `rtunnel pki rotate switch` when all of them show this list's number in /statusz.",
    )


@rotate_group.command("switch")
@_dir
def rotate_switch(directory: Path) -> None:
    """Let the new CA issue certificates."""
    with _changing(directory) as opened:
        opened.switch_rotation()
        left = plural(len(opened.waiting()), "certificate")
    _say(
        f"The new CA issues certificates now. Still in use from the old CA: {left} (`rtunnel pki list`).",
        "Agents replace theirs when they renew. Issue each broker a new one: `rtunnel pki issue broker`.",
        f"Replace all copies of {directory / pki.CA_FILE}: processes start with them.",
        "Next: run `rtunnel pki rotate finish` when no certificate of the old CA is needed any more.",
    )


@rotate_group.command("finish")
@_dir
@click.option(
    "--force", is_flag=True, help="Finish even while certificates of the old CA are in use; they become void."
)
@click.option(
    "--stolen",
    is_flag=True,
    help="Like --force, and also end all sessions and streams that were opened by its certificates.",
)
def rotate_finish(directory: Path, force: bool, stolen: bool) -> None:
    """End the trust in the old CA. Refused while its certificates are in use, unless --force is
    given.

    Sessions of agents without a certificate of the new CA end within 5 seconds, with their streams.

    Use --stolen when somebody else has the old CA's key. Every stream that was proved by the old CA
    then ends too, as does every link to a broker that has shown a certificate of it, and all join
    tokens are revoked. The command accepts --stolen also after the rotation was finished.
    """
    with _changing(directory) as opened:
        left = opened.waiting()
        opened.finish_rotation(force=force, stolen=stolen)
    _say(
        "The old CA is no longer in force.",
        *([f"{plural(len(left), 'certificate')} became void; the holders need new ones."] if left else []),
        f"Replace all copies of {directory / pki.CA_FILE}: processes start with them.",
        *(["All join tokens are revoked: `rtunnel pki token create` makes new ones."] if stolen else []),
        "The old key now only signs trust lists, for processes that were away. "
        + ("Delete its file." if stolen else "Delete its file when none is away."),
    )


def _say(*lines: str) -> None:
    for line in lines:
        click.echo(line)


# --- helpers --------------------------------------------------------------------------------------


@contextmanager
def _changing(directory: Path) -> Iterator[Directory]:
    with report_errors(), open_directory(directory) as opened, opened.change():
        yield opened


def _show_made(made: Sequence[Made]) -> None:
    width = max(len(str(item.path)) for item in made)
    for item in made:
        click.echo(f"{item.path!s:<{width}}  {item.what}")


def _for(seconds: int) -> str:
    unit, size = next((unit, size) for unit, size in _UNITS.items() if seconds % size == 0)
    return f"{seconds // size}{unit}"
