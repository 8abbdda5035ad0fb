"""The gateway speaks SOCKS5 and HTTP proxy to clients, and sends Dials to brokers.

- `client`: one client's negotiation, until it is joined. Relay's thread.
- `access`: policy, users and logins. Relay's thread; files and password hashes beside it.
- `limits`: how much one source and one user may have. Relay's thread.
- `resolver`: from a target's address to tuples: the route table and registry misses. trio and the
  relay's thread.
- `dial`: dials one target by its tuples, with several attempts at once where needed. Relay's
  thread.
- `trace`: dials one target by every path, and collects what each hop sees. Relay's thread.
- `diagnosis`: from the facts of a trace to its cause. Pure.
- `streams`: the open streams, for the API. Relay's thread.
- `recent`: refusals of clients in the last minutes, for traces. Relay's thread.
- `hedge`: decides when a silent attempt gets a second one beside it. Relay's thread.
- `trust`, `proof`: check brokers and agents. Relay's thread.
- `forward`: HTTP requests in absolute form, one after the other. Relay's thread.
- `audit`: one log line for each stream. Relay's thread.
- `resources`: descriptors and source ports, which a gateway can run out of. Relay's thread.
- `gateway`: one process: accept, drain, readiness. trio.
- `calls`: the operations of the API. trio.
- `serve`: the role.
"""

from rtunnel_socks.serve import ROLE

__all__ = ["ROLE"]
