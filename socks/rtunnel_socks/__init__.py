"""The gateway: SOCKS5 and HTTP proxy in, Dials to brokers out.

- `client`: what one client says, until it is joined. Relay's thread.
- `access`: who a client is, and whether it may: rules, users, logins. Relay's thread; files and hashes beside it.
- `limits`: how much one source and one user may have. Relay's thread.
- `dial`: one target, its tuples, attempts beside each other. Relay's thread.
- `gateway`: the route table's mirror, registry misses, drain. trio.
- `serve`: the role.
"""

from rtunnel_socks.serve import ROLE

__all__ = ["ROLE"]
