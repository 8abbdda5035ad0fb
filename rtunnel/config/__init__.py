"""The configuration: one TOML file with a section for each role.

`RTUNNEL_SECTION_KEY` overrides the file, and flags override both. `sections` is the source of
everything that is said about a key: its type, default, unit, meaning and check stand on its line.
Flags, error messages and the test of `docs/configuration.md` are made from it. Durations are
seconds.

`load` (in `loading`) checks the text alone: each key (`values`, `checks`), then several keys
together (`consistency`). `unit` reads a systemd unit, so that a check sees what the unit will.
`check_role` checks what one role needs on this machine before it starts; `warnings` names settings
that are allowed and probably not intended (`preflight`). A `ConfigError` lists all faults at once,
each with the source of the value, the key, the reason, and what to do.
"""

from __future__ import annotations

from rtunnel.config.checks import MAX_ADDRESSES
from rtunnel.config.loading import MAX_FILE, Flag, changed, load, reread
from rtunnel.config.preflight import ROLES, check_role, client_room, is_memory, role_sections, warnings
from rtunnel.config.sections import (
    KEYS,
    SECTIONS,
    AdmitConfig,
    AgentConfig,
    AuthorityConfig,
    BrokerConfig,
    Config,
    GatewayConfig,
    LimitsConfig,
    LogConfig,
    PublishConfig,
    RegistryConfig,
)
from rtunnel.config.unit import Unit, read_unit, unreadable
from rtunnel.config.values import (
    BadValue,
    ConfigError,
    Problem,
    canonical_ip,
    check_network,
    check_word,
    default_address,
    format_endpoint,
    host_name,
    parse_endpoint,
    parse_exposes,
    parse_range,
    slice_of,
    split_exposes,
)

__all__ = [
    "KEYS",
    "MAX_ADDRESSES",
    "MAX_FILE",
    "ROLES",
    "SECTIONS",
    "AdmitConfig",
    "AgentConfig",
    "AuthorityConfig",
    "BadValue",
    "BrokerConfig",
    "Config",
    "ConfigError",
    "Flag",
    "GatewayConfig",
    "LimitsConfig",
    "LogConfig",
    "Problem",
    "PublishConfig",
    "RegistryConfig",
    "Unit",
    "canonical_ip",
    "changed",
    "check_network",
    "check_role",
    "check_word",
    "client_room",
    "default_address",
    "format_endpoint",
    "host_name",
    "is_memory",
    "load",
    "parse_endpoint",
    "parse_exposes",
    "parse_range",
    "read_unit",
    "reread",
    "role_sections",
    "slice_of",
    "split_exposes",
    "unreadable",
    "warnings",
]
