"""The broker accepts agents' links, gives each a port, records tuples, and passes Dials on.

- `node`: the node's life: start, drain, readiness. trio.
- `presence`: this node in the registry: incarnation, heartbeats. trio.
- `linkport`: the port that agents dial: links until they are proved. Relay's thread.
- `session`: one link and its control stream, in the relay's thread.
- `greeting`: what the broker decides on a Hello.
- `notes`: departures and refusals that the registry has not been told yet.
- `registrar`: ports and tuples for sessions, before Welcome and at the end. trio.
- `admit`: which agents may register, and what (`[[broker.admit]]`).
- `duplicates`: two hosts with one agent_id: which session stays.
- `trust`: the CAs, revocations and certificates of this node, and requests for certificates.
- `log`: the log lines of one node.
- `ports`: guarded and open ports, per connection, in the relay's thread.
- `calls`: the operations of the API. trio.
- `serve`: the role.
"""

from rtunnel_broker.serve import ROLE

__all__ = ["ROLE"]
