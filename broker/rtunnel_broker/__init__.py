"""The broker: takes agents' links, gives each a port, records tuples, and passes Dials on.

- `session`: the control stream of one link, in the relay's thread.
- `ports`: guarded and open ports, per connection, in the relay's thread.
- `node`: the node's life: registry, heartbeats, registration, drain. trio.
- `serve`: the role.
"""

from rtunnel_broker.serve import ROLE

__all__ = ["ROLE"]
