"""The agent dials out to brokers, holds sessions on different nodes, and connects Dials to targets.

- `agent`: keeps the wanted number of sessions. trio.
- `hello`: the Hellos with which its sessions begin.
- `dialler`: links to brokers, and requests over them; `brokers`: which address is next. trio.
- `race`: links that are dialled beside each other. trio.
- `addresses`: which of its addresses this host has.
- `handshake`: one link and its control stream, in the relay's thread.
- `targets`: Dials in, connections to targets out, in the relay's thread.
- `complaint`: tells a broker that TLS has rejected the agent's certificate. trio.
- `ways`: through which interface packets to an address leave; for traces.
- `identity`: the agent's certificate and key, kept current. trio.
- `enrolment`: requests for a certificate; `token`: the join token that they need; `schedule`: when
  a certificate is renewed.
- `proof`: proofs that an answer to a Dial is the agent's own, in the relay's thread.
- `host`: the id of this host, by which a restart differs from a clone.
- `serve`: the role.
"""

from rtunnel_agent.serve import ROLE

__all__ = ["ROLE"]
