"""The pages of docs/refusals/, made from `Refusal` and docs/refusals.toml: `python -m support.refusal_pages`."""

from __future__ import annotations

import textwrap
import tomllib
from pathlib import Path
from typing import Final

import msgspec

from rtunnel.wire.refusal import Next, Refusal, ReplyMapping

ROOT: Final = Path(__file__).parents[2]
DATA: Final = ROOT / "docs" / "refusals.toml"
PAGES: Final = ROOT / "docs" / "refusals"

#: RFC 1928, section 6.
SOCKS_WORDS: Final = {
    0x01: "general SOCKS server failure",
    0x02: "connection not allowed by ruleset",
    0x03: "network unreachable",
    0x04: "host unreachable",
    0x05: "connection refused",
    0x06: "TTL expired",
    0x07: "command not supported",
    0x08: "address type not supported",
}
NEXT_WORDS: Final = {
    Next.STOP: "The gateway stops: another path would give the same answer.",
    Next.TRY: "The gateway tries the next path to the agent.",
    Next.FORGET: "The gateway forgets the tuple and tries the next path.",
}
CLIENT_WORDS: Final = {
    "direct": "A client gets this code.",
    "own": "A client gets this code only when the gateway itself says it. When paths say it and none works, the client "
    "gets [`agent_unavailable`](agent_unavailable.md), whose sentence names this code.",
    "hidden": "A client does not get this code: when no path works it gets "
    "[`agent_unavailable`](agent_unavailable.md), whose sentence names this code.",
    "never": "No client gets this code.",
}
#: Instead of the sentences above, for a code of paths that the table passes on.
PASSED_ON: Final = (
    "A client gets this code when the gateway itself or every path says it, and "
    "[`agent_unavailable`](agent_unavailable.md) otherwise."
)
GENERATED: Final = "<!-- Made from rtunnel/wire/refusal.py and docs/refusals.toml by `make pages`: edit those. -->"


class Advice(msgspec.Struct, forbid_unknown_fields=True):
    """What docs/refusals.toml says of one code; the comment at its top explains the keys."""

    means: str
    said_by: list[str]
    do: list[str]
    log: list[str]
    series: list[str]
    client: str


def load_advice() -> dict[str, Advice]:
    """Return the advice by code's word. Raises msgspec.ValidationError for a missing or unknown key."""
    return msgspec.convert(tomllib.loads(DATA.read_text(encoding="utf-8")), dict[str, Advice])


def page(code: Refusal, advice: Advice) -> str:
    """Return the page of one code."""
    reply = code.reply
    label = f'{{code="{code.value}"}}'
    events = [f"`{event}` ({role})" for role, _, event in (entry.partition(": ") for entry in advice.log)]
    series = [f"`{name}{label}`" for name in advice.series]
    parts = [
        f"# {code.value}",
        GENERATED,
        _wrapped(advice.means),
        "## Who says it",
        _listed(advice.said_by),
        "## What to do",
        _listed(advice.do),
        "## How it looks",
        "| where | what |\n| --- | --- |\n"
        f"| sentence, unless the sender knows more | {reply.text} |\n"
        f"| SOCKS5 reply | `0x{reply.socks:02x}` ({SOCKS_WORDS[reply.socks]}) |\n"
        f"| HTTP status | `{reply.http}` |\n"
        f"| Proxy-Status | `error={reply.proxy_status}` |\n"
        f"| log | {', '.join(events) or 'no event has it'} |\n"
        f"| metrics | {', '.join(series) or 'no series has it'} |",
        _wrapped(f"{client_words(reply, advice)} {NEXT_WORDS[reply.next]}"),
    ]
    return "\n\n".join(parts) + "\n"


def client_words(reply: ReplyMapping, advice: Advice) -> str:
    """Return the sentence that says when a client gets this code."""
    return PASSED_ON if reply.passed_on and reply.next is not Next.STOP else CLIENT_WORDS[advice.client]


def index(advices: dict[str, Advice]) -> str:
    """Return the page that lists all codes."""
    rows = [
        f"| [`{code.value}`]({code.value}.md) | {code.reply.text} | `0x{code.reply.socks:02x}` | {code.reply.http} |"
        for code in Refusal
    ]
    text = (
        "A refusal code says why rtunnel did not connect something. The same word stands in the client's reply (as the "
        "sentence of an HTTP answer), in log lines (`code`), in metrics (the label `code`), and on the wire. Each word "
        "below leads to a page that says who uses it and what to do. Replies and statuses of codes that no client "
        "gets are those that it would get."
    )
    head = "| code | meaning | SOCKS5 | HTTP |\n| --- | --- | --- | --- |\n"
    assert set(advices) == {code.value for code in Refusal}
    return "\n\n".join(["# Refusal codes", GENERATED, _wrapped(text), head + "\n".join(rows)]) + "\n"


def pages() -> dict[str, str]:
    """Return every file of docs/refusals/ by name."""
    advices = load_advice()
    return {"index.md": index(advices), **{f"{code}.md": page(code, advices[code.value]) for code in Refusal}}


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _listed(items: list[str]) -> str:
    return "\n".join(_wrapped(f"- {item}", "  ") for item in items)


def main() -> None:
    """Write the pages, and remove those of codes that are gone."""
    made = pages()
    PAGES.mkdir(exist_ok=True)
    for old in PAGES.glob("*.md"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (PAGES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
