"""`/metrics` as Prometheus asks for it, read by the parser of its own library."""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass
from typing import Any

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

#: Labels that docs/metrics.md has not in its table: whose a series is, and a histogram's bounds.
WHOSE = {"role", "worker", "le"}


@dataclass
class Scrape:
    """One answer."""

    families: list[Metric]

    def value(self, name: str, **labels: str) -> float:
        """The one sample of this name that has these labels."""
        (value,) = self.values(name, **labels)
        return value

    def values(self, name: str, **labels: str) -> list[float]:
        """All of them."""
        samples = [sample for family in self.families for sample in family.samples]
        return [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]

    def counted(self, name: str, label: str) -> dict[str, float]:
        """What is not 0, by the words of a label."""
        samples = [sample for family in self.families for sample in family.samples]
        return {s.labels[label]: s.value for s in samples if s.name == name and s.value}

    @property
    def series(self) -> set[tuple[str, str, str, str, str]]:
        """(name, type, label, meaning, role) of all that is there."""
        return {
            (
                family.name if family.type == "histogram" else sample.name,
                family.type,
                ", ".join(sorted(sample.labels.keys() - WHOSE)),
                family.documentation,
                sample.labels["role"],
            )
            for family in self.families
            for sample in family.samples
        }


def scrape(address: str, proxy: str = "") -> Scrape:
    """Ask, as an operator's Prometheus does; by a proxy if one is given."""
    handler = urllib.request.ProxyHandler({"http": f"http://{proxy}"} if proxy else {})
    with urllib.request.build_opener(handler).open(f"http://{address}/metrics", timeout=5) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        return parsed(answer.read())


def parsed(text: bytes) -> Scrape:
    families: list[Any] = list(text_string_to_metric_families(text.decode()))
    names = [sample.name for family in families for sample in family.samples]
    keys = [(s.name, tuple(sorted(s.labels.items()))) for f in families for s in f.samples]
    assert len(keys) == len(set(keys)), "a sample is there twice"
    assert all(name.startswith("rtunnel_") for name in names)
    return Scrape(families)
