"""Read Redis through the registry's own class, or forge a tuple in it. Run inside the centre VPC.

ledger.py URL snapshot      prints all tuples as a JSON list
ledger.py URL forge         standard input: {"forged": tuple, "instead_of": tuple or null}
"""

from __future__ import annotations

import json
import sys

import msgspec

from rtunnel.config import RegistryConfig
from rtunnel.registry import Registration, Tuple, connect


def main() -> None:
    """See the module."""
    _, url, verb = sys.argv
    registry = connect(RegistryConfig(url=url))
    try:
        if verb == "snapshot":
            print(json.dumps(msgspec.to_builtins(registry.snapshot().tuples)))
            return
        asked = json.load(sys.stdin)
        if asked["instead_of"] is not None:
            real = msgspec.convert(asked["instead_of"], Tuple)
            registry.unregister(Registration(epoch=real.epoch, tuples=(real,), leases=()))
        forged = msgspec.convert(asked["forged"], Tuple)
        registry.register(Registration(epoch=forged.epoch, tuples=(forged,), leases=()))
    finally:
        registry.close()


if __name__ == "__main__":
    main()
