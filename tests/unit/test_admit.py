"""Rules of admission, and the keys of configuration that say who may join."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rtunnel import config
from rtunnel.config import AdmitConfig, Config, ConfigError, Flag, load
from rtunnel_broker.admit import EVERYTHING, Admission

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def write(directory: Path, text: str) -> Path:
    path = directory / "rtunnel.toml"
    path.write_text(text)
    return path


def fault(**keys: Any) -> str:
    """What `load` has against these keys."""
    with pytest.raises(ConfigError) as caught:
        load(None, {}, {key.replace("__", "."): value for key, value in keys.items()})
    return str(caught.value)


# --- rules --------------------------------------------------------------------------------------------------


def rule_of(rules: list[AdmitConfig], namespace: str, *addresses: str) -> int | None:
    """The number of the rule for an agent; 0: there are no rules, None: none fits."""
    rule = Admission(rules).rule(namespace, addresses)
    return None if rule is None else rule.number


def test_without_rules_everything_goes() -> None:
    assert Admission([]).rule("any", ["10.0.0.1"]) is EVERYTHING
    assert EVERYTHING.allows(1) and not EVERYTHING.streams


def test_the_first_rule_counts() -> None:
    """Also when a later one fits better."""
    rules = [AdmitConfig(namespaces=["a", "b"]), AdmitConfig(networks=["10.0.0.0/8"]), AdmitConfig(networks=["::/0"])]
    assert rule_of(rules, "b", "10.0.0.1") == 1
    assert rule_of(rules, "c", "10.0.0.1") == 2
    assert rule_of(rules, "c", "fd00::1") == 3
    assert rule_of(rules, "c", "11.0.0.1") is None


def test_every_address_has_to_be_in_a_network() -> None:
    """In any of them, of its own family; one that is outside is enough to be refused."""
    rules = [AdmitConfig(networks=["10.0.0.0/8", "fd00::/8"])]
    assert rule_of(rules, "x", "10.0.0.1", "fd00::1") == 1
    assert rule_of(rules, "x", "10.0.0.1", "11.0.0.1") is None


def test_a_rule_allows_the_ports_that_it_names() -> None:
    rule = Admission([AdmitConfig(open_ports=["30000", "30005-30009"])]).rule("x", ["10.0.0.1"])
    assert rule is not None
    assert [port for port in range(29999, 30012) if rule.allows(port)] == [30000, *range(30005, 30010)]


# --- keys ---------------------------------------------------------------------------------------------------


def test_rules_in_a_file(tmp_path: Path) -> None:
    """Numbers are ports too; what is wrong is named by rule and key."""
    path = write(tmp_path, '[[broker.admit]]\nnamespaces = ["a"]\nopen_ports = [30000, "30005-30009"]\nstreams = 7\n')
    (rule,) = load(path, {}, {}).broker.admit
    assert (rule.namespaces, rule.open_ports, rule.streams) == (["a"], ["30000", "30005-30009"], 7)
    write(tmp_path, '[[broker.admit]]\nnamespace = ["a"]\n')
    with pytest.raises(
        ConfigError, match=r"broker.admit\[0\].namespace: is not a known key \(did you mean namespaces\?\)"
    ):
        load(path, {}, {})


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"broker__admit": [{"networks": ["10.0.0.1/8"]}]}, "write 10.0.0.0/8"),
        ({"broker__admit": [{"namespaces": ["a b"]}]}, "has a space"),
        ({"broker__admit": [{"open_ports": ["x"]}]}, "is not a port"),
        ({"broker__admit": [{"streams": -1}]}, "or 0 for no limit"),
        ({"broker__admit": "blue"}, "which only a file can give"),
        ({"broker__authority": "10.0.0.9:0"}, "port 0 can't be dialled"),
        ({"broker__authority": "10.0.0.9:7443"}, "has no effect without broker.ca (give"),
        ({"broker__trust": "trust.list"}, "has no effect without broker.ca (give"),
        ({"agent__certificate": "a.pem"}, "agent.key: is not given, and agent.certificate is"),
        ({"agent__key": "a.key"}, "agent.certificate: is not given, and agent.key is"),
        (
            {"agent__key": "k", "agent__certificate": "c", "agent__identity": "d"},
            "is given, and agent.certificate is given too",
        ),
        ({"agent__exposes": "loopback:"}, "is not a port"),
        ({"agent__exposes": "loopback:0"}, "is not a port"),
        ({"agent__exposes": "lo:80"}, "is not a port"),
        ({"agent__exposes": "80-90,loopback:85-99"}, "85 is exposed twice"),
    ],
)
def test_bad_keys_of_identity_and_admission(keys: dict[str, Any], reason: str) -> None:
    assert reason in fault(**keys)


def test_ports_on_loopback_have_one_spelling() -> None:
    exposes = load(None, {}, {"agent.exposes": [22, " loopback:9100 ", "loopback:8000-8100"]}).agent.exposes
    assert exposes == ["22", "loopback:9100", "loopback:8000-8100"]
    assert config.split_exposes(exposes) == (["22"], ["9100", "8000-8100"])


def preflight(role: str, **keys: str) -> list[str]:
    """Which keys a role misses, of those that say who may join."""
    given = {key.replace("__", "."): value for key, value in keys.items()}
    with pytest.raises(ConfigError) as caught:
        config.check_role(load(None, {}, given), role)
    wanted = {"broker.ca", "broker.join_token", "agent.join_token", "agent.ca"}
    return sorted({problem.key for problem in caught.value.problems if "is not given" in problem.reason} & wanted)


def test_who_may_join_needs_a_certificate_or_a_token(tmp_path: Path) -> None:
    """A token where there are no certificates, and nothing more than what is used."""
    assert preflight("broker") == ["broker.ca"]
    assert preflight("broker", broker__ca="ca.pem") == []
    assert preflight("broker", broker__ca="ca.pem", broker__security="plain") == ["broker.join_token"]
    assert preflight("agent") == ["agent.ca", "agent.join_token"]
    assert preflight("agent", agent__identity="home") == ["agent.ca", "agent.join_token"]
    (tmp_path / "agent.pem").touch()
    assert preflight("agent", agent__identity=str(tmp_path)) == ["agent.ca"]
    assert preflight("agent", agent__certificate="a.pem", agent__key="a.key", agent__ca="ca.pem") == []
    assert preflight("agent", agent__identity="home", agent__security="plain") == ["agent.ca", "agent.join_token"]


def test_a_trust_list_need_not_be_there(tmp_path: Path) -> None:
    """The broker writes it; the CAs have to be there."""
    keys = {"broker.ca": str(tmp_path / "ca.pem"), "broker.trust": str(tmp_path / "trust.list")}
    with pytest.raises(ConfigError) as caught:
        config.check_role(load(None, {}, keys), "broker")
    assert "ca.pem can't be read" in str(caught.value) and "trust.list" not in str(caught.value)


# --- reading again ------------------------------------------------------------------------------------------


def test_a_file_that_is_read_again(tmp_path: Path) -> None:
    """What it says now counts; variables and flags stay, also against it."""
    path = write(tmp_path, '[agent]\nexposes = ["22"]\nredundancy = 3\ntarget_timeout = 1\n')
    publish = {"RTUNNEL_AGENT_PUBLISH": "10.0.0.1:80@30001", "RTUNNEL_AGENT_ADDRESSES": "10.0.0.1"}
    loaded = load(path, publish, {"agent.redundancy": Flag("--redundancy", 2)})
    write(tmp_path, '[agent]\nexposes = ["23"]\nredundancy = 4\n')
    again = config.reread(loaded)
    assert config.changed(loaded, again) == ["agent.exposes", "agent.target_timeout"]
    assert (again.agent.exposes, again.agent.redundancy, again.agent.target_timeout) == (["23"], 2, 10.0)
    assert again.agent.publish == loaded.agent.publish
    assert again.sources == {key: source for key, source in loaded.sources.items() if "timeout" not in key}
    write(tmp_path, "[agent]\nexposes = 1\n")
    with pytest.raises(ConfigError, match=r"agent\.exposes"):
        config.reread(again)


def test_without_a_file_nothing_is_read_again() -> None:
    assert Config().file == load(None, {}, {"agent.exposes": "22"}).file == ""


def test_the_page_has_the_admission_tables_keys() -> None:
    """The keys of [[broker.admit]] stand on the page with their units and meanings."""
    text = PAGE.read_text()
    for row in (
        "| `namespaces` | `[]` | words |",
        "| `networks` | `[]` | CIDRs |",
        "| `open_ports` | `[]` | ports |",
        "| `streams` | `0` | count |",
    ):
        assert row in text
