"""The series of `/metrics` for Prometheus, each a place in the role's status (`/statusz`).

Nothing is counted here. A supervisor's status contains those of its workers; the label `worker`
distinguishes their series. They are not added up: a worker that is started again begins at 0, which
in a sum would look like a burst of events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from rtunnel.compat import override
from rtunnel.histogram import BOUNDS, Histogram
from rtunnel.relay.join import Ending
from rtunnel.relay.lost import LostKind
from rtunnel.strangers import Loss
from rtunnel.wire.refusal import Refusal

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

Status = Mapping[str, Any]
#: One word, or one for each label of a series with several.
Words = str | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Series:
    """One series. `value` finds it in a status: a number, or numbers by the words of the labels.

    None means that the status lacks it. A name that ends in `_total` is a counter; `value` of a
    `histogram` gives the counts of its buckets and their sum. `words` of the one label exist from
    the start, with 0, because Prometheus does not see the step from nothing to 1.
    """

    name: str
    help: str
    value: Callable[[Status], float | Mapping[Any, Any] | None]
    labels: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    histogram: bool = False

    @property
    def zero(self) -> Any:
        """The value of a word that nothing was counted for."""
        return Histogram().status() if self.histogram else 0


def text(status: Status) -> bytes:
    """Return the status of a role or supervisor in the text format of Prometheus."""
    registry = CollectorRegistry()
    registry.register(_Statuses(status))
    return generate_latest(registry)


class _Statuses(Collector):
    def __init__(self, status: Status) -> None:
        self._labels = ["role", "worker"] if "workers" in status else ["role"]
        role = status.get("role", "")
        self._of = [([role, str(each["worker"])], each) for each in status.get("workers", ())] or [([role], status)]

    @override
    def collect(self) -> Iterator[Metric]:
        for series in SERIES:
            metric = self._metric(series)
            if metric.samples:
                yield metric

    def _metric(self, series: Series) -> Metric:
        labels = [*self._labels, *series.labels]
        if series.histogram:
            histogram = HistogramMetricFamily(series.name, series.help, labels=labels)
            for names, words, times in self._found(series):
                histogram.add_metric([*names, *words], _buckets(times["counts"]), times["seconds"])
            return histogram
        family = GaugeMetricFamily if not series.name.endswith("_total") else CounterMetricFamily
        metric = family(series.name, series.help, labels=labels)
        for names, words, value in self._found(series):
            metric.add_metric([*names, *words], value)
        return metric

    def _found(self, series: Series) -> Iterator[tuple[list[str], tuple[str, ...], Any]]:
        """Yield whose it is, the words of the series' labels, and the value."""
        for names, status in self._of:
            for words, value in _values(series, status):
                yield names, (words,) if isinstance(words, str) else words, value


def _values(series: Series, status: Status) -> list[tuple[Words, Any]]:
    value = series.value(status)
    if value is None:
        return []
    if not isinstance(value, Mapping):
        return [((), value)]
    # There are thousands of agents: each shows only words that it has met.
    known: dict[Words, Any] = {} if status.get("role") == "agent" else dict.fromkeys(series.words, series.zero)
    return list({**known, **value}.items())


#: The value of a histogram's `le` for each bucket.
_BOUNDS: Final = (*map(floatToGoString, BOUNDS), "+Inf")


def _buckets(counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return the cumulative counts with their upper bounds, as Prometheus wants them."""
    return list(zip(_BOUNDS, map(float, accumulate(counts)), strict=True))


# --- where things stand in a status ---------------------------------------------------------------


def _at(*path: str) -> Callable[[Status], Any]:
    """Return a function for the value at this path; None when a part of the path is missing."""

    def value(status: Status) -> Any:
        found: Any = status
        for name in path:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    return value


def _is_ok(*path: str) -> Callable[[Status], float | None]:
    """Return a function that gives 1 where the status says "ok", and 0 where it has a reason."""

    def value(status: Status) -> float | None:
        said = _at(*path)(status)
        return None if said in (None, "none") else float(said == "ok")

    return value


def _counted(path: str, *labels: str) -> Callable[[Status], Mapping[Words, float] | None]:
    """Return a function for the counts of a list of objects, by their words of these labels."""

    def value(status: Status) -> Mapping[Words, float] | None:
        return {tuple(e[label] for label in labels): e["count"] for e in status[path]} if path in status else None

    return value


def _times(path: str, *labels: str) -> Callable[[Status], Mapping[Words, Any] | None]:
    """Return a function for the histograms of a list of objects, by their words of these labels."""

    def value(status: Status) -> Mapping[Words, Any] | None:
        entries = status.get(path)
        if entries is None:
            return None
        return {e[labels[0]] if len(labels) == 1 else tuple(e[label] for label in labels): e for e in entries}

    return value


def _ready(status: Status) -> float | None:
    reasons = status.get("reasons", status.get("reason"))
    return None if reasons is None or "role" not in status else float(not reasons)


def _ports(status: Status) -> Mapping[Words, float] | None:
    ranges = status.get("ports")
    if ranges is None:
        return None
    return {
        (name, state): counts[field]
        for name, counts in ranges.items()
        for state, field in (("free", "free"), ("used", "in_use"), ("resting", "quarantined"), ("foreign", "foreign"))
    }


def _round_trips(status: Status) -> Mapping[Words, float] | None:
    """Return the round trip of each session of an agent, in seconds: it has two or three."""
    if status.get("role") != "agent":
        return None
    return {session["node"]: session["rtt_ms"] / 1000 for session in status["sessions"] if session.get("rtt_ms")}


def _sessions(status: Status) -> Mapping[str, float] | None:
    sessions = status.get("sessions")
    if sessions is None:
        return None
    if isinstance(sessions, int):  # all sessions of a broker drain with it
        return {"live": 0, "draining": 0, status["state"]: sessions}
    return {"live": len(sessions), "draining": len(status["draining"])}


#: Claims of second hosts that have a series. A peer chooses the words of each, so there is a limit.
MAX_CLAIMS: Final = 32


def _duplicates(status: Status) -> Mapping[str, float] | None:
    entries = status.get("duplicate_agents")
    if entries is None:
        return None
    # Without a claim the value is 0, so that the series exists before the first one.
    return {"": 0} | {
        f"{e['namespace']}/{e['agent_id']}: {e['holder']} stays, {e['refused']} is refused": e["tries"]
        for e in entries[:MAX_CLAIMS]
    }


def _nodes(status: Status) -> Mapping[str, float] | None:
    nodes = status.get("nodes")
    if nodes is None:
        return None
    states = [node["state"] for node in nodes]
    return {state: states.count(state) for state in ("live", "draining")}


def _draining(status: Status) -> float | None:
    state = status.get("state")
    return float(state == "draining") if state in ("live", "draining") else None


def _trust(what: str) -> Callable[[Status], float | None]:
    def value(status: Status) -> Any:
        return _at("trust", what)(status) if "trust" in status else _at("identity", "trust", what)(status)

    return value


def _seconds_left(*path: str) -> Callable[[Status], float | None]:
    def value(status: Status) -> float | None:
        ends = _at(*path)(status)
        return ends - time.time() if ends else None

    return value


def _certificate_left(status: Status) -> float | None:
    path = ("certificate_ends",) if "certificate_ends" in status else ("identity", "ends")
    return _seconds_left(*path)(status)


def _bytes(status: Status) -> Mapping[str, float] | None:
    return {way: status[f"bytes_{way}"] for way in ("up", "down")} if "bytes_up" in status else None


def _issued(status: Status) -> Mapping[str, float] | None:
    return {way: status[way] for way in ("enrolled", "renewed")} if "enrolled" in status else None


_CODES: Final = tuple(code.value for code in Refusal)
_UNPROVEN: Final = (Refusal.NOT_PROVEN.value, Refusal.REVOKED.value)

#: Causes of a session's end: `Session.way_out` of the broker, and how links end.
_ENDINGS: Final = ("left", "drained", "replaced", *(kind.value for kind in LostKind))

#: docs/metrics.md describes the same series, and the roles that have them.
SERIES: Final = (
    Series(
        "rtunnel_build_info", "Always 1; the label is the version of rtunnel",
        lambda s: {v: 1} if (v := s.get("version")) else None, ("version",),
    ),
    Series("rtunnel_ready", "1 when /readyz answers 200", _ready),
    Series("rtunnel_descriptors", "Descriptors that the process has open", _at("descriptors")),
    Series("rtunnel_descriptor_limit", "Descriptors that the process may have", _at("descriptor_limit")),
    # Streams.
    Series("rtunnel_streams", "Streams that are open now", _at("streams")),
    Series(
        "rtunnel_streams_accepted_total",
        "Streams that were joined; at a broker with the agent, whose answer may still be no",
        _at("accepted"),
    ),
    Series(
        "rtunnel_stream_endings_total", "Streams that are over, by why",
        _at("endings"), ("ending",), tuple(Ending),
    ),
    Series(
        "rtunnel_stream_bytes_total", "Bytes of streams; up is from client to target; at a broker with the agent's "
        "answer to the Dial",
        _bytes, ("direction",),
    ),
    Series(
        "rtunnel_refusals_total", "Streams that were refused, by the code that was told; by an authority: requests for "
        "certificates, and connections above its limits (overloaded)",
        _at("refused"), ("code",), _CODES,
    ),
    Series(
        "rtunnel_hedges_total", "Dials whose path was silent: sent on a second path beside it; or held back by the "
        "budget of one in ten, at least for a while",
        _at("hedges"), ("outcome",), ("sent", "held"),
    ),
    Series(
        "rtunnel_setup_seconds", "Time from a client's request to its answer, by the answer: accepted, or the code of "
        "the refusal",
        _times("setup_times", "code"), ("code",), ("accepted",), histogram=True,
    ),
    Series(
        "rtunnel_first_byte_seconds", "Time from the answer to a client until the target's first byte, of tunnels that "
        "have ended",
        _times("first_byte_times"), histogram=True,
    ),
    Series(
        "rtunnel_attempts_total", "Attempts of dials, by broker node and result: accepted, no_answer, or a code",
        _counted("attempts", "node", "code"), ("node", "code"),
    ),
    Series("rtunnel_clients_negotiating", "Clients that have no stream yet", _at("clients")),
    Series(
        "rtunnel_dials_waiting", "Connections to ports whose Dial, or whose agent's answer, has not come yet",
        _at("waiting"),
    ),
    Series(
        "rtunnel_proof_failures_total", "Answers to Dials that were not proved to be the target's agent's, by code",
        _at("proof_failures"), ("code",), _UNPROVEN,
    ),
    Series(
        "rtunnel_dials_expired_total", "Dials that were refused as expired: the clocks of gateway and broker differ",
        _at("clock", "expired"),
    ),
    Series(
        "rtunnel_clock_offset_seconds", "Own clock minus the other side's, when a Dial was last refused as "
        "expired; 0 while clocks agree",
        _at("clock", "offset"),
    ),
    Series(
        "rtunnel_shortages_total", "Connects to brokers that failed for want of something of this machine",
        _at("shortages"), ("what",), ("source_ports", "descriptors"),
    ),
    # Sessions.
    Series("rtunnel_sessions", "Sessions; those of a node that drains are draining", _sessions, ("state",)),
    Series("rtunnel_sessions_wanted", "Sessions that the agent is to have (agent.redundancy)", _at("sessions_wanted")),
    Series(
        "rtunnel_on_one_host", "1 when the agent has several sessions, and all on one host",
        lambda s: float(bool(s["one_host"])) if "one_host" in s else None,
    ),
    Series("rtunnel_handshakes", "Links that are not proven yet", _at("handshakes")),
    Series(
        "rtunnel_session_refusals_total", "Links that were refused a session or a certificate, by code; duplicate_node "
        "is an agent's way to its other node",
        _at("session_refusals"), ("code",), _CODES,
    ),
    Series(
        "rtunnel_session_endings_total", "Sessions that have ended, by cause; replaced: by a newer one of its agent",
        _at("session_endings"), ("cause",), _ENDINGS,
    ),
    Series(
        "rtunnel_links_lost_total", "Links that ended before they were proved or refused, by cause; a probe is closed "
        "by its peer before the first byte",
        _at("links_lost"), ("cause",), tuple(Loss),
    ),
    Series(
        "rtunnel_dials_lost_total", "Connections to guarded ports that ended before their Dial, by cause",
        _at("dials_lost"), ("cause",), tuple(Loss),
    ),
    Series(
        "rtunnel_duplicate_agents", "Tries of a second host with an agent_id that a living session of another has, "
        "in the last minutes; the label names the agent, the host that stays and the one that was refused",
        _duplicates, ("claim",),
    ),
    Series(
        "rtunnel_path_round_trip_seconds", "Round trips of pings to agents, of all links together",
        _times("round_trips"), histogram=True,
    ),
    Series(
        "rtunnel_session_round_trip_seconds", "The last measured round trip to this broker node", _round_trips,
        ("node",),
    ),
    Series("rtunnel_pings_total", "Pings that were sent on links", _at("pings")),
    Series("rtunnel_pings_lost_total", "Pings that had no answer within 2 s", _at("pings_lost")),
    Series(
        "rtunnel_ports", "Ports of a range, by state; foreign: used by other programs", _ports, ("range", "state"),
    ),
    Series(
        "rtunnel_window_budget_bytes", "What is left of the budget by which windows grow", _at("window_budget"),
    ),
    Series("rtunnel_held_bytes", "Bytes of streams that wait for somebody who does not take them", _at("held")),
    # Registry.
    Series(
        "rtunnel_registry_up",
        "1 when the last heartbeat (broker) or look (gateway) at the registry worked, and the gateway saw a broker's "
        "heartbeat",
        _is_ok("registry"),
    ),
    Series(
        "rtunnel_registry_call_seconds", "Time of calls of the registry, by call and result: ok, unavailable, or "
        "refused; follow_once waits up to 1 s for a change",
        _times("registry_calls", "call", "result"), ("call", "result"), histogram=True,
    ),
    Series("rtunnel_beat_age_seconds", "Since the last complete heartbeat", _at("beat_age")),
    Series("rtunnel_tuples_registered", "Tuples that the last complete heartbeat kept alive", _at("tuples_registered")),
    Series(
        "rtunnel_tuples_put_back_total", "Tuples that a heartbeat found missing, and wrote again",
        _at("tuples_put_back"),
    ),
    Series("rtunnel_notes_dropped_total", "Departures and refusals that were not written", _at("notes", "dropped")),
    Series(
        "rtunnel_registry_clock_offset_seconds", "Own clock minus the registry's; none while it is not known",
        _at("registry_clock_offset"),
    ),
    Series("rtunnel_tuples", "Tuples in the route table", _at("tuples")),
    Series("rtunnel_nodes", "Broker nodes in the route table", _nodes, ("state",)),
    Series("rtunnel_tuples_forgotten_total", "Tuples that a broker or an agent called stale", _at("forgotten")),
    Series(
        "rtunnel_route_table_age_seconds", "Since the route table was last known to be as the registry",
        _at("routes_age"),
    ),
    Series("rtunnel_draining", "1 while it drains", _draining),
    Series(
        "rtunnel_files_rejected", "Files of rules or users with a fault: what they said before is in force",
        lambda s: len(s["access"]["rejected"]) if "access" in s else None,
    ),
    # Identity.
    Series("rtunnel_trust_list_number", "Of the trust list in force; 0 before the first one", _trust("number")),
    Series("rtunnel_trust_list_generation", "Of the same; it grows when agents are told", _trust("generation")),
    Series(
        "rtunnel_authority_up", "1 when the last question to the authority was answered; none without an authority",
        _is_ok("trust", "authority"),
    ),
    Series(
        "rtunnel_certificate_seconds_left", "Until its own certificate ends, by its clock; none without one",
        _certificate_left,
    ),
    Series(
        "rtunnel_renewal_failed", "1 when the last request for a certificate came to nothing",
        lambda s: float(bool(s["identity"]["failure"])) if s.get("identity") else None,
    ),
    Series("rtunnel_ca_seconds_left", "Until the CA ends that certificates are made with", _seconds_left("ca_ends")),
    Series(
        "rtunnel_certificates_issued_total", "Certificates: enrolled for a join token, renewed for the one before",
        _issued, ("way",),
    ),
    Series("rtunnel_connections", "Connections of brokers and gateways", _at("connections")),
    Series("rtunnel_store_up", "1 when the authority's store can be read and written", _is_ok("store")),
    # Workers.
    Series(
        "rtunnel_worker_up", "1 when the worker answers its supervisor; the series above are missing when it does not",
        lambda s: float("role" in s) if "worker" in s else None,
    ),
    Series("rtunnel_worker_restarts_total", "How often the worker was started again", _at("restarts")),
)  # fmt: skip
