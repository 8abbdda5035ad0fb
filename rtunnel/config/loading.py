"""Loads file, environment and flags into one `Config`."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import msgspec

from rtunnel.config.consistency import contradictions
from rtunnel.config.sections import ENV_PREFIX, FILE, FOLDER, KEYS, SECTIONS, Config, Leaf, Section
from rtunnel.config.values import BadValue, ConfigError, Problem

#: Bytes of a configuration, which is a page of text; a larger file is the wrong one.
MAX_FILE = 1 << 20


class Flag(NamedTuple):
    """An override with the name of the flag that gave it."""

    name: str
    value: object


class _Given(NamedTuple):
    value: Any
    source: str
    base: Path | None = None  # the folder of the configuration file, where its relative paths start


def load(path: Path | None, environ: Mapping[str, str], overrides: Mapping[str, object]) -> Config:
    """Return the configuration: defaults, overridden by file, then environment, then `overrides`.

    `overrides` maps a key ("broker.listen") to a value or `Flag`; None means not given. Raises
    ConfigError with every fault that can be found without looking at the machine.
    """
    problems: list[Problem] = []
    given = {**_from_file(path, problems), **_from_environ(environ, problems), **_from_overrides(overrides, problems)}
    values: dict[str, Any] = {}
    for key, entry in given.items():
        try:
            values[key] = _value(KEYS[key], entry)
        except BadValue as error:
            problems.append(Problem(entry.source, key, str(error), error.fix))
        except (msgspec.ValidationError, OverflowError) as error:
            problems.append(_type_problem(KEYS[key], entry, str(error)))
    if problems:
        raise ConfigError(problems)
    config: Config = _build(Config, "", values)
    config.sources = {key: entry.source for key, entry in given.items()}
    config.file = str(path or "")
    if problems := list(contradictions(config)):
        raise ConfigError(problems)
    return config


def reread(config: Config) -> Config:
    """Return the configuration with the present contents of its file. Raises ConfigError.

    Environment variables and flags keep their values.
    """
    kept = {key: Flag(source, config.get(key)) for key, source in config.sources.items() if source != config.file}
    return load(Path(config.file), {}, kept)


def changed(old: Config, new: Config) -> list[str]:
    """Return the keys whose values differ."""
    return [path for path in KEYS if old.get(path) != new.get(path)]


def _from_file(path: Path | None, problems: list[Problem]) -> dict[str, _Given]:
    if path is None:
        return {}
    found: dict[str, _Given] = {}
    _flatten(_read_toml(path), "", path, found, problems)
    return found


def _read_toml(path: Path) -> dict[str, Any]:
    source = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        raise ConfigError([Problem(source, "", f"can't be read: {reason}")]) from None
    if len(data) > MAX_FILE:
        raise ConfigError([Problem(source, "", f"is larger than {MAX_FILE >> 20} MiB", "give the configuration file")])
    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError([Problem(f"{source}:{line}", "", "is not UTF-8 text", "save it as UTF-8")]) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([_syntax_problem(source, data, str(error))]) from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, a tower of brackets
        raise ConfigError([Problem(source, "", f"can't be parsed: {error}")]) from None


def _syntax_problem(source: str, data: bytes, text: str) -> Problem:
    """Return a problem with the position behind the file's name, where editors expect it.

    tomllib puts the position at the end of its message.
    """
    if match := re.search(r" \(at line (\d+), column (\d+)\)$", text):
        line, column = match.groups()
        return Problem(f"{source}:{line}:{column}", "", f"is not TOML: {text[: match.start()]}")
    line = str(data.count(b"\n") + 1)
    return Problem(f"{source}:{line}", "", f"is not TOML: {text.removesuffix(' (at end of document)')}, at the end")


def _flatten(
    table: Mapping[str, Any], prefix: str, path: Path, found: dict[str, _Given], problems: list[Problem]
) -> None:
    for name, value in table.items():
        key = prefix + name
        if key in KEYS:
            found[key] = _Given(value, str(path), path.parent)
        elif not any(known.startswith(key + ".") for known in KEYS):
            problems.append(Problem(str(path), _shown(key), "is not a known key", _nearest(key)))
        elif isinstance(value, dict):
            _flatten(value, key + ".", path, found, problems)
        else:
            problems.append(Problem(str(path), key, "is a section, not a value", f"write [{key}]"))


def _shown(key: str) -> str:
    return key if key.isprintable() else repr(key)


def _nearest(key: str) -> str:
    """Return a suggestion for an unknown key, at first from its own section."""
    prefix, _, name = key.rpartition(".")
    depth = prefix.count(".") + 1 if prefix else 0
    siblings = {known.split(".")[depth] for known in KEYS if not prefix or known.startswith(prefix + ".")}
    if near := difflib.get_close_matches(name, siblings, 1):
        return f"did you mean {prefix + '.' if prefix else ''}{near[0]}?"
    elsewhere = [known for known in KEYS if known.rpartition(".")[2] == name]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:2])}?"
    return "known here: " + ", ".join(sorted(siblings)) if siblings else ""


# Kubernetes sets these in every pod when there is a Service with the name rtunnel-broker.
_SERVICE_LINK = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_PROTO|_PORT|_ADDR)?)")
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://")
_ENVS = {leaf.env: leaf.path for leaf in KEYS.values()}


def _from_environ(environ: Mapping[str, str], problems: list[Problem]) -> dict[str, _Given]:
    found: dict[str, _Given] = {}
    for variable, value in environ.items():
        if variable in _ENVS:
            found[_ENVS[variable]] = _Given(value, f"${variable}")
        elif _is_section_variable(variable) and not _is_service_link(variable, value):
            near = difflib.get_close_matches(variable, _ENVS, 1)
            problems.append(
                Problem(f"${variable}", "", "is not a known key", f"did you mean ${near[0]}?" if near else "")
            )
    return found


def _is_section_variable(variable: str) -> bool:
    return variable.startswith(tuple(f"{ENV_PREFIX}{section.upper()}_" for section in SECTIONS))


def _is_service_link(variable: str, value: str) -> bool:
    return bool(_SERVICE_LINK.fullmatch(variable)) or (variable.endswith("_PORT") and bool(_SERVICE_URL.match(value)))


def _from_overrides(overrides: Mapping[str, object], problems: list[Problem]) -> dict[str, _Given]:
    found: dict[str, _Given] = {}
    for key, value in overrides.items():
        flag = value if isinstance(value, Flag) else Flag("override", value)
        if flag.value is None:
            continue
        if key in KEYS:
            found[key] = _Given(flag.value, flag.name)
        else:
            problems.append(Problem(flag.name, _shown(key), "is not a known key", _nearest(key)))
    return found


def _value(leaf: Leaf, given: _Given) -> Any:
    value = given.value
    # Only a file has types: the text of a variable or flag is read as the key's type.
    from_text = given.base is None
    if leaf.is_list and from_text:
        value = _split(value)
    if leaf.key.before is not None and isinstance(value, list):
        value = leaf.key.before(value)
    value = msgspec.convert(value, leaf.type, strict=not from_text)
    if leaf.key.unit in (FILE, FOLDER) and value and given.base is not None:
        value = str(given.base / value)
    return value if leaf.key.check is None else leaf.key.check(value)


def _split(value: Any) -> Any:
    """Return the parts of comma-separated text, or of several from a repeated flag."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        return value
    parts: list[Any] = []
    for item in items:
        parts += [word.strip() for word in item.split(",") if word.strip()] if isinstance(item, str) else [item]
    return parts


def _type_problem(leaf: Leaf, given: _Given, text: str) -> Problem:
    reason, _, where = text.partition(" - at `$")
    key = leaf.path + where.rstrip("`")
    if match := re.fullmatch(r"Object contains unknown field `(.*)`", reason):
        known = [field.name for field in msgspec.structs.fields(get_args(leaf.type)[0])]
        near = difflib.get_close_matches(match[1], known, 1)
        fix = f"did you mean {near[0]}?" if near else "known here: " + ", ".join(known)
        return Problem(given.source, f"{key}.{_shown(match[1])}", "is not a known key", fix)
    default = msgspec.json.encode(leaf.default).decode()
    if given.base is None and leaf.type in (int, float):
        reason = f"{given.value!r} is not a {'whole ' if leaf.type is int else ''}number"
    return Problem(given.source, key, reason[:1].lower() + reason[1:], f"the default is {default}")


def _build(struct: type[Any], path: str, values: Mapping[str, Any]) -> Any:
    arguments: dict[str, Any] = {}
    for name, hint in _hints(struct).items():
        if isinstance(hint, type) and issubclass(hint, Section):
            arguments[name] = _build(hint, f"{path}{name}.", values)
        elif path + name in values:
            arguments[name] = values[path + name]
    return struct(**arguments)


#: A cache of the types of each section's fields: computing them is most of a `load`.
_hints_of: dict[type[Any], dict[str, Any]] = {}


def _hints(struct: type[Any]) -> dict[str, Any]:
    """Return the types of a section's fields by name."""
    if struct not in _hints_of:
        _hints_of[struct] = get_type_hints(struct)
    return _hints_of[struct]
