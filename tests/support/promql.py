"""The series, labels and words in PromQL, compared with the series that roles have."""

from __future__ import annotations

import re
from typing import Final

from rtunnel import metrics
from rtunnel.wire.refusal import Refusal

SERIES: Final = {series.name: series for series in metrics.SERIES}
#: Labels of every series; Prometheus adds job and instance, and in Kubernetes the namespace.
COMMON: Final = {"role", "worker", "job", "instance", "namespace"}
#: The words of labels that `Series.words` does not name.
WORDS: Final = {
    "role": {"broker", "gateway", "agent", "authority"},
    "direction": {"up", "down"},
    "range": {"guarded", "open"},
    "result": {"ok", "unavailable", "refused"},
    "way": {"enrolled", "renewed"},
    "call": {"beat", "follow_once"},
}
#: Labels with any words.
FREE: Final = {"worker", "job", "instance", "namespace", "node", "claim", "version", "le"}
_STATES: Final = {"rtunnel_ports": {"free", "used", "resting", "foreign"}}
_CODES: Final = {code.value for code in Refusal} | {"accepted", "no_answer"}


def series_in(expr: str) -> set[str]:
    """The names of series; a histogram's without _bucket, _sum and _count."""
    return {_series(name) for name in re.findall(r"rtunnel_\w+", expr)}


def _series(name: str) -> str:
    base = re.sub(r"_(bucket|sum|count)$", "", name)
    return base if base in SERIES and SERIES[base].histogram else name


def faults(expr: str) -> list[str]:
    """What in the expression does not exist: series, labels, words of labels."""
    used = series_in(expr)
    found = [f"no series {name}" for name in used if name not in SERIES]
    if found or not used:
        return found or ["no series of rtunnel"]
    found += [
        f"{name} is a histogram"
        for name in re.findall(r"rtunnel_\w+", expr)
        if name in SERIES and SERIES[name].histogram
    ]
    labels = COMMON.union(*(SERIES[name].labels for name in used))
    if any(SERIES[name].histogram for name in used):
        labels.add("le")
    for named in re.findall(r"\b(?:by|without|on|ignoring|group_left|group_right) *\(([^)]*)\)", expr):
        found += [f"no label {label}" for label in re.findall(r"\w+", named) if label not in labels]
    for name, matchers in re.findall(r"(rtunnel_\w+)\{([^}]*)\}", expr):
        for label, words in re.findall(r'(\w+) *[=!]~? *"([^"]*)"', matchers):
            found += _matcher_faults(_series(name), label, words)
    return found


def _matcher_faults(name: str, label: str, words: str) -> list[str]:
    series = SERIES[name]
    if label not in {*series.labels, *COMMON, *(["le"] if series.histogram else ())}:
        return [f"{name} has no label {label}"]
    if "$" in words or label in FREE:
        return []
    known = WORDS.get(label) or _STATES.get(name) or set(series.words)
    known = _CODES if label == "code" else {"live", "draining"} if label == "state" and not known else known
    return [f"{name} has no {label} {word!r}" for word in words.split("|") if word not in known]
