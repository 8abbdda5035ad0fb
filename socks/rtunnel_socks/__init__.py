"""The gateway speaks SOCKS5 and HTTP proxy to clients, and sends Dials to brokers.

- `client`: one client's negotiation, until it is joined. Relay's thread.
- `access`: who a client is and what its rules allow: policy, users, logins. Relay's thread; files and hashes beside it.
- `limits`: how much one source and one user may have. Relay's thread.
- `resolver`: from a target's address to tuples: the route table and registry misses. trio and the relay's thread.
- `dial`: one target, its tuples, attempts beside each other. Relay's thread.
- `hedge`: when a silent attempt is joined by a second one. Relay's thread.
- `trust`, `proof`: by what brokers and agents are checked. Relay's thread.
- `forward`: requests in absolute form, one after the other. Relay's thread.
- `audit`: one line for each stream. Relay's thread.
- `resources`: what a gateway can run out of by itself. Relay's thread.
- `gateway`: one process: accept, drain, readiness. trio.
- `serve`: the role.
"""

from rtunnel_socks.serve import ROLE

__all__ = ["ROLE"]
