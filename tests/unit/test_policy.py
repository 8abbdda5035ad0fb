"""Rules: the first that fits decides, as a walk over them would; what is wrong with a file is told."""

from __future__ import annotations

import json
import tempfile
from ipaddress import ip_address, ip_network
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from rtunnel import cli
from rtunnel.config import parse_exposes
from rtunnel.errors import TrustError
from rtunnel.trust import policy
from rtunnel.trust.policy import LOCAL_ONLY, SPECIAL, Networks, Policy, Question, Rule, Verdict, load_policy
from support.effort import times


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return path


def fault(tmp_path: Path, text: str) -> str:
    with pytest.raises(TrustError) as caught:
        load_policy(written(tmp_path, text))
    return str(caught.value).replace(str(tmp_path / "policy.toml"), "FILE")


def asks(rules: Policy, who: str, target: str, port: int, namespace: str = "default") -> Verdict:
    """`who` is user@source, or a source alone."""
    user, _, source = who.rpartition("@")
    return rules.verdict(Question(user or None, source, namespace, target, port))


# --- the first match --------------------------------------------------------------------------------------


def inside(ip: str, networks: list[str]) -> bool:
    return any(ip_address(ip) in ip_network(network) for network in networks)


def covers(rule: Rule, ip: str) -> bool:
    """What `to` covers, by the words of docs/policy.md: special addresses are allowed only by a network among them."""
    if rule.to is not None and not inside(ip, rule.to):
        return False
    if rule.action == "deny":
        return True
    kinds = [ip_network(network) for network in SPECIAL]
    if not any(ip_address(ip) in kind for kind in kinds):
        return True
    named = [ip_network(network) for network in rule.to or () if ip_address(ip) in ip_network(network)]
    return any(net.version == kind.version and net.subnet_of(kind) for net in named for kind in kinds)  # type: ignore[arg-type]


def fits(rule: Rule, ask: Question) -> bool:
    return (
        (rule.users is None or (ask.user is not None and (ask.user in rule.users or "*" in rule.users)))
        and (rule.sources is None or inside(ask.source, rule.sources))
        and (rule.namespaces is None or ask.namespace in rule.namespaces)
        and covers(rule, ask.ip)
        and (
            rule.ports is None
            or any(low <= ask.port <= high for low, high in parse_exposes(list(map(str, rule.ports))))
        )
    )


def walked(rules: list[Rule], ask: Question) -> int:
    """The number of the first rule that fits, one after the other."""
    return next((number for number, rule in enumerate(rules, 1) if fits(rule, ask)), 0)


# Few different values, close to each other: then rules overlap and edges are hit.
ADDRESSES = """
    10.0.0.0 10.0.0.1 10.0.0.7 10.0.0.8 10.0.1.0 10.255.255.255 9.255.255.255 0.0.0.1 127.0.0.1 127.5.0.7
    169.254.169.254 224.0.0.1 255.255.255.255 :: ::1 fd00::1 fd00::2 fe80::1 ff02::1
    ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff
"""
addresses = st.sampled_from(ADDRESSES.split())


@st.composite
def networks(draw: st.DrawFn) -> str:
    address = draw(addresses)
    most = 128 if ":" in address else 32
    bits = draw(st.sampled_from([0, 1, 7, 8, 16, 24, 29, 30, 31, most - 1, most]))
    return str(ip_network(f"{address}/{min(bits, most)}", strict=False))


@st.composite
def port_ranges(draw: st.DrawFn) -> str | int:
    port = st.sampled_from([1, 2, 22, 23, 80, 443, 65535])
    low, high = sorted((draw(port), draw(port)))
    return f"{low}-{high}" if draw(st.booleans()) else low


def listed(values: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.none() | st.lists(values, min_size=1, max_size=3)


rules = st.builds(
    Rule,
    action=st.sampled_from(["allow", "deny"]),
    users=listed(st.sampled_from(["alice", "bob", "*"])),
    sources=listed(networks()),
    namespaces=listed(st.sampled_from(["default", "vpc-a"])),
    to=listed(networks()),
    ports=listed(port_ranges()),
)
questions = st.builds(
    Question,
    user=st.sampled_from([None, "alice", "bob", "carol"]),
    source=addresses,
    namespace=st.sampled_from(["default", "vpc-a", "vpc-b"]),
    ip=addresses,
    port=st.sampled_from([1, 2, 21, 22, 23, 80, 443, 444, 65535]),
)


@settings(max_examples=times(120), deadline=None)
@given(st.lists(rules, max_size=12), st.lists(questions, min_size=1, max_size=20))
def test_it_is_the_first_match(some: list[Rule], asked: list[Question]) -> None:
    """Whatever the rules are, the verdict is that of a walk over them."""
    compiled = Policy(some)
    for ask in asked:
        verdict = compiled.verdict(ask)
        number = walked(some, ask)
        assert verdict.number == number
        assert verdict.allowed == (number > 0 and some[number - 1].action == "allow")


@settings(max_examples=times(40), deadline=None)
@given(st.lists(rules, max_size=6), questions)
def test_nearly_is_all_but_one_key(some: list[Rule], ask: Question) -> None:
    """The rules that `policy test` shows would fit if the key that it names were not given."""
    for verdict, key in Policy(some).nearly(ask):
        rule = some[verdict.number - 1]
        assert not fits(rule, ask)
        if key != "to":  # that one is also about special addresses
            wider = {"sources" if key == "from" else key: None}
            assert fits(msgspec.structs.replace(rule, **wider), ask)


@given(st.lists(networks(), min_size=0, max_size=5), addresses)
def test_networks_are_sets(some: list[str], ip: str) -> None:
    """`in` is the ipaddress module's."""
    assert (ip in Networks(some)) == inside(ip, some)


def test_the_example_of_the_page_means_what_it_says(tmp_path: Path) -> None:
    """docs/policy.md: its rules load, and its table of clients and targets says what they answer."""
    page = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
    loaded = load_policy(written(tmp_path, page.split("```toml\n")[1].split("```")[0]))
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `") and "@" in line]
    assert len(rows) >= 5
    for who, target, told in rows:
        ip, _, port = target.strip("`").rpartition(":")
        verdict = asks(loaded, who.strip("`").removeprefix("nobody@"), ip, int(port))
        assert f"{'allow' if verdict.allowed else 'deny'}: {verdict.rule}" == told, who


# --- what nobody may --------------------------------------------------------------------------------------


def test_without_rules_only_this_machine() -> None:
    """The built-in rules: loopback clients reach everything, also loopback targets; others nothing."""
    assert asks(LOCAL_ONLY, "127.0.0.1", "10.1.0.7", 22).allowed
    assert asks(LOCAL_ONLY, "127.3.0.1", "127.5.0.7", 9100).allowed
    assert asks(LOCAL_ONLY, "alice@::1", "fd00::7", 1).allowed
    assert not asks(LOCAL_ONLY, "10.0.0.1", "10.1.0.7", 22).allowed
    assert not asks(LOCAL_ONLY, "alice@fd00::1", "10.1.0.7", 22).allowed


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1", "0.0.0.0", "::", "169.254.169.254", "224.0.0.1", "fe80::1"])
def test_special_targets_must_be_named(ip: str) -> None:
    """Neither no `to` nor a wide one allows them; a network of their own does; a deny means everything."""
    wide = ["0.0.0.0/0", "::/0"]
    assert not asks(Policy([Rule(action="allow")]), "10.0.0.1", ip, 80).allowed
    assert not asks(Policy([Rule(action="allow", to=wide)]), "10.0.0.1", ip, 80).allowed
    named = Rule(action="allow", to=[f"{ip}/{128 if ':' in ip else 32}"])
    assert asks(Policy([named]), "10.0.0.1", ip, 80).allowed
    assert asks(Policy([Rule(action="deny"), named]), "10.0.0.1", ip, 80) == Verdict(False, 1, "")
    assert policy.special(ip) and not policy.special("10.0.0.1")


def test_anonymous_clients_fit_no_rule_with_users() -> None:
    """Also not "*", which is whoever has logged in."""
    loaded = Policy([Rule(action="deny", users=["mallory"]), Rule(action="allow", users=["*"])])
    assert asks(loaded, "alice@10.0.0.1", "10.1.0.7", 22) == Verdict(True, 2, "")
    assert asks(loaded, "mallory@10.0.0.1", "10.1.0.7", 22) == Verdict(False, 1, "")
    assert asks(loaded, "10.0.0.1", "10.1.0.7", 22) == policy.NO_RULE
    assert asks(loaded, "*@10.0.0.1", "10.1.0.7", 22).allowed  # nobody can have that name (users.check_name)


# --- the file ---------------------------------------------------------------------------------------------

GOOD = """
[[rule]]
name = "operators"
action = "allow"
users = ["alice"]
from = ["10.9.0.0/16", "fd00::/8"]
namespaces = ["default"]
to = ["10.1.0.7"]
ports = [22, "9000-9999"]
"""


def test_a_file_loads(tmp_path: Path) -> None:
    """All keys, ports as numbers too, one address for a network."""
    loaded = load_policy(written(tmp_path, GOOD))
    assert asks(loaded, "alice@10.9.3.4", "10.1.0.7", 9500) == Verdict(True, 1, "operators")
    assert asks(loaded, "alice@10.9.3.4", "10.1.0.7", 9500).rule == "1 operators"
    assert not asks(loaded, "alice@10.9.3.4", "10.1.0.8", 22).allowed
    assert not asks(loaded, "alice@10.9.3.4", "10.1.0.7", 22, "vpc-a").allowed


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", 'FILE: has no rule (to forbid everything, write one with action = "deny")'),
        ("rules = 1", "FILE: 'rules' is not a known key (rules are written [[rule]])"),
        ("[rule]\naction = 'allow'", "FILE: rule is not a list (write [[rule]], with two brackets)"),
        ("[[rule]]\n[[rule", "FILE: is not TOML: "),
        ("\xff", "FILE: is not TOML: "),
        ("[[rule]]", 'FILE: rule 1: action: must be given (write action = "allow" or action = "deny")'),
        ("[[rule]]\naction = 'maybe'", "FILE: rule 1: action: must be given"),
        ("rule = [1]", "FILE: rule 1: expected `object`, got `int`"),
        (
            "[[rule]]\nname='x'\naction='deny'\nform=[]",
            "FILE: rule 1 (x): 'form' is not a known key (did you mean from?)",
        ),
        ("[[rule]]\naction='deny'\nusers=[]", "FILE: rule 1: users: is empty, which matches nobody (leave it out"),
        ("[[rule]]\naction='deny'\nusers='a'", "FILE: rule 1: users: expected `array | null`, got `str`"),
        ("[[rule]]\naction='deny'\nfrom=['10.0.0.1/8']", "FILE: rule 1: from: '10.0.0.1/8' has bits set behind its"),
        ("[[rule]]\naction='deny'\nto=['::ffff:10.0.0.0/104']", "FILE: rule 1: to: '::ffff:10.0.0.0/104' is IPv4"),
        ("[[rule]]\naction='deny'\nto=['host']", "FILE: rule 1: to: 'host' is not a network"),
        ("[[rule]]\naction='deny'\nports=[70000]", "FILE: rule 1: ports: '70000' is not a port"),
        ("[[rule]]\naction='deny'\nports=['9-2']", "FILE: rule 1: ports: '9-2' ends before it begins (write 2-9)"),
        ("[[rule]]\naction='deny'\nnamespaces=['a b']", "FILE: rule 1: namespaces: 'a b' has a space"),
        ('[[rule]]\naction="deny"\nname="\\u001b[2J"', "FILE: rule 1: name: must be up to 128 printable characters"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, text: str, told: str) -> None:
    """File, number of the rule, key, reason, and mostly what to write instead."""
    path = tmp_path / "policy.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(TrustError) as caught:
        load_policy(path)
    assert str(caught.value).replace(str(path), "FILE").startswith(told)


@settings(deadline=None)
@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(policy._KEYS), inner, max_size=4),
        max_leaves=8,
    )
)
def test_any_file_loads_or_is_refused(content: object) -> None:
    """Nothing but TrustError comes out of a file, or the gateway that looks at it would die of it."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "policy.toml"
        text = content if isinstance(content, bytes) else f"rule = [{_inline(content)}]".encode("utf-8", "replace")
        path.write_bytes(text)
        try:
            load_policy(path)
        except TrustError as error:
            assert str(path) in str(error)


def _inline(value: object) -> str:
    """As an inline value of TOML; what TOML can't say becomes nonsense, which is as good."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value)


def test_all_faults_are_told_up_to_a_limit(tmp_path: Path) -> None:
    """One line each."""
    lines = fault(tmp_path, "[[rule]]\naction='deny'\nto=['x']\n" * 30).splitlines()
    assert len(lines) == 21 and lines[-1] == "FILE: and 10 more"


def test_sizes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules, the memory that they take, the file; and a file that is not there."""
    assert "has 20001 rules, over" in fault(tmp_path, "[[rule]]\naction='deny'\n" * 20001)
    monkeypatch.setattr(policy, "_MAX_TABLE", 10)
    text = "".join(f"[[rule]]\naction='deny'\nto=['10.0.{n}.0/24']\n" for n in range(0, 60, 2))
    assert fault(tmp_path, text) == "FILE: 60 different values of one key in 30 rules are too many: use larger networks"
    monkeypatch.setattr(policy, "_MAX_FILE", 10)
    assert "give the file of the gateway's rules" in fault(tmp_path, text)
    with pytest.raises(TrustError, match="can't be read: No such file"):
        load_policy(tmp_path / "none")


# --- rtunnel policy test ----------------------------------------------------------------------------------


def policy_test(*arguments: str) -> Result:
    return CliRunner().invoke(cli.cli, ["policy", "test", *arguments])


def test_policy_test_explains(tmp_path: Path) -> None:
    """The verdict is the exit code; the rule that made it is shown, or how near others were."""
    path = str(written(tmp_path, GOOD))
    yes = policy_test("--file", path, "--user", "alice", "--from", "10.9.0.4", "10.1.0.7:22")
    assert yes.exit_code == 0
    assert yes.output.splitlines()[0] == f"allow: rule 1 operators ({path})"
    assert '  from = ["10.9.0.0/16","fd00::/8"]' in yes.output.splitlines()
    no = policy_test("--file", path, "--from", "10.9.0.4", "10.1.0.7:22")
    assert (no.exit_code, no.output.splitlines()) == (
        1,
        [f"deny: no rule matches ({path})", "  except for `users`, rule 1 operators would allow it"],
    )
    loop = policy_test("--file", path, "--user", "alice", "--from", "10.9.0.4", "127.0.0.1:22")
    assert "127.0.0.1 is a loopback address: only a rule whose `to` names it allows it" in loop.output


def test_policy_test_in_json_and_by_the_configuration(tmp_path: Path) -> None:
    """--config gives the file and the namespace."""
    written(tmp_path, GOOD)
    (tmp_path / "rtunnel.toml").write_text('[gateway]\npolicy = "policy.toml"\nnamespace = "vpc-a"\n')
    file = str(tmp_path / "rtunnel.toml")
    common = ("--config", file, "--user", "alice", "--from", "10.9.0.4", "10.1.0.7:22", "--json")
    assert json.loads(policy_test(*common).stdout)["allowed"] is False
    answer = json.loads(policy_test(*common, "--namespace", "default").stdout)
    assert (answer["allowed"], answer["rule"], answer["text"]["name"]) == (True, 1, "operators")


def test_policy_test_refuses_nonsense(tmp_path: Path) -> None:
    """A target without a port, a source that is no address, a bad file: code 2."""
    assert policy_test("--from", "10.0.0.1", "10.1.0.7").exit_code == 2
    assert policy_test("--from", "here", "10.1.0.7:1").exit_code == 2
    assert policy_test("--file", str(written(tmp_path, "x")), "--from", "10.0.0.1", "10.1.0.7:1").exit_code == 2
    local = policy_test("--from", "127.0.0.1", "10.1.0.7:1")
    assert (local.exit_code, local.output) == (0, "allow: rule 1 built in: this machine (no policy is given)\n")
