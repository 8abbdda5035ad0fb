"""What a look-up in many rules costs: `python -m bench.policy [RULES]`. Informational; no test depends on it.

Two kinds of rules: random ones, where networks of seven lengths and port ranges overlap as they like; and the worst for
a walk, where only the last one fits.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rtunnel.trust.policy import Policy, Question, load_policy

LOOKUPS = 20_000
#: Rounds over all questions; of each question the fastest counts: what a busy machine adds is not the look-up's. All
#: others come between two tries, so that the processor's caches help as little as in life.
ROUNDS = 5
_random = random.Random(1)


def main() -> None:
    """Measure and print."""
    rules = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    print(f"{'rules':30} {'load':>8} {'median':>9} {'p99':>9} {'slowest':>9}")
    for name, rule in (("random", a_random_rule), ("only the last one fits", a_host_rule)):
        loaded, seconds = load(rules, rule)
        last = Question("u7", "10.9.0.1", "default", host(rules - 1), 22)
        questions = [last if rule is a_host_rule else a_question() for _ in range(LOOKUPS)]
        rounds = [[timed(loaded, question) for question in questions] for _ in range(ROUNDS)]
        took = [min(tries) for tries in zip(*rounds, strict=True)]
        figures = (statistics.median(took), statistics.quantiles(took, n=100)[98], max(took))
        print(f"{rules:7} {name:22} {seconds:6.2f} s", *(f"{figure / 1e3:6.1f} µs" for figure in figures))


def load(count: int, rule: Callable[[int], str]) -> tuple[Policy, float]:
    """So many rules from a file, and the seconds that it took."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "policy.toml"
        path.write_text("".join(map(rule, range(count))))
        began = time.perf_counter()
        return load_policy(path), time.perf_counter() - began


def timed(loaded: Policy, question: Question) -> int:
    """Nanoseconds of one look-up."""
    began = time.perf_counter_ns()
    loaded.verdict(question)
    return time.perf_counter_ns() - began


def a_random_rule(number: int) -> str:
    low = _random.randrange(1, 60000)
    action = _random.choice(("allow", "deny"))
    return (
        f'[[rule]]\nname = "rule {number}"\naction = "{action}"\n'
        f'users = ["{a_user()}", "{a_user()}"]\nfrom = ["{a_network()}", "{a_network()}"]\nto = ["{a_network()}"]\n'
        f'ports = ["{_random.randrange(1, 65536)}", "{low}-{low + _random.randrange(5000)}"]\n'
    )


def a_host_rule(number: int) -> str:
    return f'[[rule]]\naction = "allow"\nusers = ["*"]\nfrom = ["10.9.0.0/16"]\nto = ["{host(number)}"]\nports = [22]\n'


def host(number: int) -> str:
    """The address of one host."""
    return f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"


def a_question() -> Question:
    return Question(a_user(), dotted(_random.getrandbits(32)), "default", dotted(_random.getrandbits(32)), 22)


def a_user() -> str:
    return f"u{_random.randrange(1000)}"


def a_network() -> str:
    length = _random.choice((8, 12, 16, 20, 24, 28, 32))
    return f"{dotted(_random.getrandbits(length) << (32 - length))}/{length}"


def dotted(address: int) -> str:
    return ".".join(str(address >> shift & 255) for shift in (24, 16, 8, 0))


if __name__ == "__main__":
    main()
