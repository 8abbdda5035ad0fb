"""The rules of a gateway: which client may reach which target (docs/policy.md).

The rules stand in one file. The first rule that matches decides; a request that matches none is
denied.

    [[rule]]
    name = "operators"
    action = "allow"
    users = ["alice", "bob"]     # "*": every user who has logged in; absent: everybody
    from = ["10.9.0.0/16"]       # absent: every source
    namespaces = ["default"]     # absent: every namespace
    to = ["10.1.0.0/16"]         # absent: every address that is not special
    ports = ["22", "9000-9999"]  # absent: every port

A lookup does not walk the rules. A dictionary or a bisection gives one integer for each of the five
keys, in which bit N is set when rule N accepts the value. The lowest bit of all five ANDed is
the first rule that matches. This takes the same few microseconds for 10,000 rules, whatever they
say.
"""

from __future__ import annotations

import difflib
import re
import socket
import tomllib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import msgspec

from rtunnel.config import BadValue, check_network, check_word, parse_exposes
from rtunnel.errors import TrustError

MAX_RULES: Final = 20_000
_MAX_FILE: Final = 16 << 20
# Bytes of one key's integers, enough for 10,000 rules with 50,000 networks.
_MAX_TABLE: Final = 128 << 20
# Faults of one file that an error lists.
_MAX_FAULTS: Final = 20
_SHOWN_NEAR: Final = 3

#: Networks that a rule allows only when its `to` names a network inside one of them: addresses of
#: the agent's own machine, and addresses that are not of one host. Clouds serve the metadata of
#: their machines on link-local addresses.
SPECIAL: Final = {
    "0.0.0.0/8": "an unspecified address",
    "127.0.0.0/8": "a loopback address",
    "169.254.0.0/16": "a link-local address",
    "224.0.0.0/4": "a multicast address",
    "255.255.255.255/32": "the broadcast address",
    "::/128": "the unspecified address",
    "::1/128": "the loopback address",
    "fe80::/10": "a link-local address",
    "ff00::/8": "a multicast address",
}

# The name that stands for every user who has logged in.
_LOGGED_IN: Final = "*"

Span = tuple[int, int]


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rule as it stands in the file. The value of an absent key is None."""

    action: Literal["allow", "deny"]
    name: str = ""
    users: list[str] | None = None
    sources: list[str] | None = msgspec.field(default=None, name="from")
    namespaces: list[str] | None = None
    to: list[str] | None = None
    ports: list[str | int] | None = None


class Question(NamedTuple):
    """The question whether this client may reach this target.

    `user` is None for a client without a login; addresses are canonical.
    """

    user: str | None
    source: str
    namespace: str
    ip: str
    port: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer, and the number (from 1) of the rule that gave it, or 0 when none matches."""

    allowed: bool
    number: int
    name: str

    @property
    def rule(self) -> str:
        """The rule's number and name, for log lines."""
        return f"{self.number} {self.name}".rstrip() if self.number else self.name


#: The verdict on a request that matches no rule.
NO_RULE: Final = Verdict(False, 0, "none")


# --- the rules of a key, by its value -------------------------------------------------------------

_V6: Final = 1 << 32  # IPv6 addresses follow IPv4 addresses in one range of numbers
_END: Final = _V6 + (1 << 128)


def _number(ip: str) -> int:
    if ":" in ip:
        return _V6 + int.from_bytes(socket.inet_pton(socket.AF_INET6, ip))
    return int.from_bytes(socket.inet_pton(socket.AF_INET, ip))


def _span(network: str) -> Span:
    first = ip_network(network)
    low = int(first.network_address) + (_V6 if first.version == 6 else 0)
    return low, low + first.num_addresses


_SPECIAL_SPANS: Final = tuple(sorted(map(_span, SPECIAL)))


def _without_special(spans: Iterable[Span]) -> Iterator[Span]:
    """Yield the parts outside special networks, and whole spans that lie inside one of them.

    A rule that names a network inside a special one means it.
    """
    for low, high in spans:
        if any(first <= low and high <= last for first, last in _SPECIAL_SPANS):
            yield low, high
            continue
        for first, last in _SPECIAL_SPANS:
            if low < last and first < high:
                if low < first:
                    yield low, first
                low = max(low, last)
        if low < high:
            yield low, high


_ORDINARY: Final = tuple(_without_special([(0, _END)]))


class _Spans:
    """Maps a number to the rules that have a span with it (low <= number < high)."""

    __slots__ = ("bits", "starts")

    def __init__(self, of_rules: Iterable[Sequence[Span] | None], rules: int) -> None:
        toggles: dict[int, int] = {}
        bits = 0
        for index, spans in enumerate(of_rules):
            bit = 1 << index
            if spans is None:
                bits |= bit
                continue
            for edge in _edges(spans):
                toggles[edge] = toggles.get(edge, 0) ^ bit
        _bound(len(toggles), rules)
        self.starts = [0]
        self.bits = [bits]
        same = {bits: bits}
        for edge in sorted(toggles):
            bits ^= toggles[edge]
            self.starts.append(edge)
            self.bits.append(same.setdefault(bits, bits))

    def of(self, number: int) -> int:
        """Return the rules that accept this number, one bit for each."""
        return self.bits[bisect_right(self.starts, number) - 1]


def _edges(spans: Sequence[Span]) -> Iterator[int]:
    """Yield the numbers at which one rule's spans, merged, begin and end."""
    end = -1
    for low, high in sorted(spans):
        if low > end:
            if end >= 0:
                yield end
            yield low
        end = max(end, high)
    if end >= 0:
        yield end


class _Words:
    """Maps a word to the rules that list it, or that accept any word."""

    __slots__ = ("bits", "other")

    def __init__(self, of_rules: Sequence[Sequence[str] | None]) -> None:
        self.other = sum(1 << index for index, words in enumerate(of_rules) if words is None)
        self.bits: dict[str, int] = {}
        for index, words in enumerate(of_rules):
            for word in words or ():
                self.bits[word] = self.bits.get(word, self.other) | 1 << index
        _bound(len(self.bits), len(of_rules))

    def of(self, word: str) -> int:
        """Return the rules that accept this word, one bit for each."""
        return self.bits.get(word, self.other)


def _bound(entries: int, rules: int) -> None:
    if entries * rules // 8 > _MAX_TABLE:
        raise TrustError(f"{entries} different values of one key in {rules} rules are too many: use larger networks")


# --- the policy -----------------------------------------------------------------------------------


class Policy:
    """Checked rules that answer questions from any thread. A policy never changes."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        """Prepare rules that `load_policy` has checked.

        Raises TrustError when one key has too many different values.
        """
        self.rules = tuple(rules)
        users = [rule.users for rule in rules]
        self._anonymous = sum(1 << index for index, names in enumerate(users) if names is None)
        self._users = _Words(users)
        self._logged_in = self._users.bits.pop(_LOGGED_IN, self._anonymous)
        for name in self._users.bits:
            self._users.bits[name] |= self._logged_in
        self._users.other = self._logged_in
        self._namespaces = _Words([rule.namespaces for rule in rules])
        self._sources = _Spans((_networks(rule.sources) for rule in rules), len(rules))
        self._targets = _Spans(map(_targets, rules), len(rules))
        self._ports = _Spans((_ports(rule.ports) for rule in rules), len(rules))
        verdicts = (Verdict(rule.action == "allow", number, rule.name) for number, rule in enumerate(rules, 1))
        self._verdicts = (NO_RULE, *verdicts)

    def verdict(self, question: Question) -> Verdict:
        """Return the verdict of the first rule that matches."""
        user, source, namespace, ip, port = question
        fits = (
            (self._anonymous if user is None else self._users.of(user))
            & self._sources.of(_number(source))
            & self._namespaces.of(namespace)
            & self._targets.of(_number(ip))
            & self._ports.of(port)
        )
        # The index of the lowest bit; `fits & -fits` gives the same and costs more.
        return self._verdicts[(fits ^ (fits - 1)).bit_length()] if fits else NO_RULE

    def nearly(self, question: Question) -> list[tuple[Verdict, str]]:
        """Return the first rules that match except for one key, with that key, for display."""
        tests = {
            "users": self._anonymous if question.user is None else self._users.of(question.user),
            "from": self._sources.of(_number(question.source)),
            "namespaces": self._namespaces.of(question.namespace),
            "to": self._targets.of(_number(question.ip)),
            "ports": self._ports.of(question.port),
        }
        near = []
        for verdict in self._verdicts[1:]:
            failing = [key for key, bits in tests.items() if not bits >> (verdict.number - 1) & 1]
            if len(failing) == 1:
                near.append((verdict, failing[0]))
        return near[:_SHOWN_NEAR]


class Networks:
    """A set of networks; `ip in networks` says whether an address is in one of them."""

    def __init__(self, networks: Sequence[str]) -> None:
        self._spans = _Spans([_networks(networks)], 1)

    def __contains__(self, ip: str) -> bool:
        return bool(self._spans.of(_number(ip)))


def special(ip: str) -> str:
    """Return the kind of special address this is ("a loopback address"), or ""."""
    number = _number(ip)
    kinds = (kind for network, kind in SPECIAL.items() if _span(network)[0] <= number < _span(network)[1])
    return next(kinds, "")


def _networks(networks: Sequence[str] | None) -> list[Span] | None:
    return None if networks is None else [_span(network) for network in networks]


def _targets(rule: Rule) -> Sequence[Span] | None:
    spans = _networks(rule.to)
    if rule.action == "deny":
        return spans  # a rule that denies every target also denies special ones
    return _ORDINARY if spans is None else list(_without_special(spans))


def _ports(ports: Sequence[str | int] | None) -> list[Span] | None:
    return None if ports is None else [(low, high + 1) for low, high in parse_exposes([str(item) for item in ports])]


#: The policy without a file: programs of this machine reach every target, others none.
LOCAL_ONLY: Final = Policy(
    [
        Rule(
            action="allow",
            name="built in: this machine",
            sources=["127.0.0.0/8", "::1/128"],
            to=["0.0.0.0/0", "::/0", *SPECIAL],
        )
    ]
)


# --- the file -------------------------------------------------------------------------------------


def load_policy(path: Path | str) -> Policy:
    """Return the rules of a file.

    Raises TrustError, which names the file, the rule's number, the key and the reason.
    """
    tables = _tables(path)
    faults: list[str] = []
    rules: list[Rule] = []
    for number, table in enumerate(tables, 1):
        try:
            rules.append(_rule(table))
        except BadValue as error:
            name = table.get("name") if isinstance(table, dict) else None
            which = f"rule {number}" + (f" ({name})" if isinstance(name, str) and name.isprintable() else "")
            faults.append(f"{path}: {which}: {error}" + (f" ({error.fix})" if error.fix else ""))
    if faults:
        more = [f"{path}: and {len(faults) - _MAX_FAULTS} more"] if len(faults) > _MAX_FAULTS else []
        raise TrustError("\n".join(faults[:_MAX_FAULTS] + more))
    try:
        return Policy(rules)
    except TrustError as error:
        raise TrustError(f"{path}: {error}") from None


def _tables(path: Path | str) -> list[Any]:
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_FILE + 1)
        if len(data) > _MAX_FILE:
            raise TrustError(f"{path}: is larger than {_MAX_FILE >> 20} MiB: give the file of the gateway's rules")
        content = tomllib.loads(data.decode())
    except OSError as error:
        raise TrustError(f"{path}: can't be read: {error.strerror or error}") from None
    # TOMLDecodeError and UnicodeDecodeError are ValueErrors.
    except (ValueError, RecursionError) as error:
        raise TrustError(f"{path}: is not TOML: {error}") from None
    for key in content:
        if key != "rule":
            raise TrustError(f"{path}: {key!r} is not a known key (rules are written [[rule]])")
    tables = content.get("rule", [])
    if not isinstance(tables, list):
        raise TrustError(f"{path}: rule is not a list (write [[rule]], with two brackets)")
    if not tables:
        # An empty file may also be one that is just being written.
        raise TrustError(f'{path}: has no rule (to forbid everything, write one with action = "deny")')
    if len(tables) > MAX_RULES:
        raise TrustError(f"{path}: has {len(tables)} rules, over {MAX_RULES}: merge rules")
    return tables


_KEYS: Final = tuple(field.encode_name for field in msgspec.structs.fields(Rule))


def _rule(table: Any) -> Rule:
    """Return a checked rule with canonical networks. Raises BadValue, which begins with the key."""
    try:
        rule = msgspec.convert(table, Rule)
    except msgspec.ValidationError as error:
        raise _type_fault(str(error)) from None
    if not rule.name.isprintable() or len(rule.name) > 128:
        raise BadValue("name: must be up to 128 printable characters")
    checked: dict[str, Any] = {}
    for key, values, check in (
        ("users", rule.users, _user),
        ("from", rule.sources, _network),
        ("namespaces", rule.namespaces, check_word),
        ("to", rule.to, _network),
        ("ports", rule.ports, _port),
    ):
        if values is not None:
            checked[key] = _checked(key, values, check)
    return msgspec.structs.replace(
        rule, **{"sources" if key == "from" else key: values for key, values in checked.items()}
    )


def _checked(key: str, values: Sequence[Any], check: Any) -> list[Any]:
    if not values:
        raise BadValue(f"{key}: is empty, which matches nobody", "leave it out to match everybody")
    try:
        return [check(value) for value in values]
    except BadValue as error:
        raise BadValue(f"{key}: {error}", error.fix) from None


def _user(text: str) -> str:
    return text if text == _LOGGED_IN else check_word(text)


def _network(text: str) -> str:
    canonical = check_network(text)
    if ":" in canonical and getattr(ip_network(canonical).network_address, "ipv4_mapped", None) is not None:
        raise BadValue(f"{text!r} is IPv4 written as IPv6", "write the IPv4 network")
    return canonical


def _port(item: str | int) -> str | int:
    parse_exposes([str(item)])
    return item


def _type_fault(text: str) -> BadValue:
    reason, _, where = text.partition(" - at `$")
    if match := re.fullmatch(r"Object contains unknown field `(.*)`", reason):
        near = difflib.get_close_matches(match[1], _KEYS, 1)
        fix = f"did you mean {near[0]}?" if near else "known here: " + ", ".join(_KEYS)
        return BadValue(f"{match[1]!r} is not a known key", fix)
    key = where.rstrip("`").lstrip(".")
    if key == "action" or "missing required field" in reason:  # `action` is the only required key
        return BadValue("action: must be given", 'write action = "allow" or action = "deny"')
    return BadValue((f"{key}: " if key else "") + reason[:1].lower() + reason[1:])
