"""The agent: dials out to brokers, holds sessions on different nodes, and connects Dials to targets.

- `handshake`: the control stream of one link, in the relay's thread.
- `brokers`: which broker address is dialled next. trio.
- `addresses`: which of its addresses this host has.
- `race`: links that are dialled beside each other. trio.
- `targets`: Dials in, connections to targets out, in the relay's thread.
- `agent`: keeps the wanted number of sessions. trio.
- `serve`: the role.
"""

from rtunnel_agent.serve import ROLE

__all__ = ["ROLE"]
