#!/usr/bin/env python3
"""Ask many hosts by their original IPs, through a gateway's SOCKS5 port, with nothing but the standard library.

    python3 controller.py --proxy vip.example:1080 --port 9100 --path /metrics 10.1.0.0/27

Prints one line for each host: its address, and the first line of the answer or the reason why there is none. The exit
code is 1 if a host could not be asked. A name or an address may be given, and networks in CIDR form.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import struct
import sys
from collections.abc import Iterable, Iterator

#: The replies of RFC 1928, section 6, as a gateway uses them (docs/wire.md, "Refusal codes").
REPLIES = {
    1: "the gateway failed, or is full",
    2: "a rule does not allow it, or the agent does not expose the port",
    3: "the agent has no route to the target",
    4: "no agent answers for this address",
    5: "the target refused the connection",
    6: "no answer in time",
    7: "command not supported",
    8: "address type not supported",
}


class Refused(Exception):
    """The gateway said no."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask many hosts by their original IPs, through a gateway.")
    parser.add_argument("hosts", nargs="+", metavar="HOST", help="an IP address or a network (10.1.0.0/27)")
    parser.add_argument("--proxy", required=True, metavar="HOST:PORT", help="the gateway's proxy port")
    parser.add_argument("--port", type=int, required=True, help="the hosts' port")
    parser.add_argument("--path", default="/", help="what is asked for, by HTTP")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS", help="for each host, in all")
    parser.add_argument("--at-once", type=int, default=10, metavar="N", help="hosts that are asked at the same time")
    return parser.parse_args()


def addresses(words: Iterable[str]) -> Iterator[str]:
    """Yield each address; a network stands for its hosts."""
    for word in words:
        if "/" in word:
            yield from map(str, ipaddress.ip_network(word).hosts())
        else:
            yield str(ipaddress.ip_address(word))


async def connect(proxy: tuple[str, int], ip: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to ip:port through the proxy. Raises Refused, OSError, EOFError."""
    reader, writer = await asyncio.open_connection(*proxy)
    try:
        packed = ipaddress.ip_address(ip).packed
        kind = b"\x01" if len(packed) == 4 else b"\x04"
        # The greeting and the request may go out together: a gateway without users answers both.
        writer.write(b"\x05\x01\x00" + b"\x05\x01\x00" + kind + packed + struct.pack(">H", port))
        if await reader.readexactly(2) != b"\x05\x00":
            raise Refused("the gateway wants a user and a password")
        _, reply, _, kind_of_bound = await reader.readexactly(4)
        await reader.readexactly({1: 4, 4: 16}[kind_of_bound] + 2)  # the bound address, which says nothing here
        if reply:
            raise Refused(REPLIES.get(reply, f"SOCKS5 reply {reply}"))
    except BaseException:
        writer.close()
        raise
    return reader, writer


async def ask(proxy: tuple[str, int], ip: str, port: int, path: str) -> str:
    """Return the status line of the answer to one HTTP request."""
    reader, writer = await connect(proxy, ip, port)
    try:
        host = f"[{ip}]" if ":" in ip else ip
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()  # until the host closes
        if not answer:
            raise EOFError("the connection ended before an answer")
        return answer.partition(b"\r\n")[0].decode(errors="replace")
    finally:
        writer.close()


async def main() -> int:
    """Ask all hosts, so many at once; return the exit code."""
    arguments = parse_arguments()
    host, _, port = arguments.proxy.rpartition(":")
    places = asyncio.Semaphore(arguments.at_once)

    async def one(ip: str) -> bool:
        async with places:
            try:
                question = ask((host.strip("[]"), int(port)), ip, arguments.port, arguments.path)
                print(ip, await asyncio.wait_for(question, arguments.timeout))
                return True
            except (Refused, OSError, EOFError) as error:  # a timeout is an OSError
                print(ip, f"failed: {error or type(error).__name__}")
                return False

    done = await asyncio.gather(*map(one, addresses(arguments.hosts)))
    print(f"{sum(done)} of {len(done)} hosts answered", file=sys.stderr)
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
