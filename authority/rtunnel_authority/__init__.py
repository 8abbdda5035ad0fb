"""The authority: gives agents certificates, and everybody the trust list. The only process with the CA's key.

- `server`: connections and messages. trio.
- `serve`: the role.

What it decides is `rtunnel.trust.authority`, what it knows `rtunnel.trust.pki`.
"""

from rtunnel_authority.serve import ROLE

__all__ = ["ROLE"]
