"""The authority role: issues agents' certificates, and publishes the trust list.

It is the only process with the CA's key.

- `server`: connections and messages, in trio's thread.
- `serve`: the role for the core's runner.

`rtunnel.trust.authority` makes its decisions; `rtunnel.trust.pki` is its directory.
"""

from rtunnel_authority.serve import ROLE

__all__ = ["ROLE"]
