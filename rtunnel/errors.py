"""The errors that several rooms share, and the exit codes of the commands."""

from __future__ import annotations

import errno
import ssl
from typing import Final

from rtunnel.clock import CHECK_CLOCK

#: Exit codes of all commands.
EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2  # a flag, a key of the configuration, a file that it names
EXIT_LISTEN: Final = 3


#: X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED (openssl/x509_vfy.h).
_OF_TIME: Final = (9, 10)


class RoleMissing(Exception):
    """No usable role of this name is installed; the text says why."""


class ListenError(Exception):
    """An address can't be listened on; the text names the key that gave it."""

    def __init__(self, key: str, address: str, fault: OSError) -> None:
        reason = (fault.strerror or str(fault)).lower()
        if fault.errno == errno.EADDRINUSE:
            reason = "the address is in use: choose another one, or stop the process that has it"
        elif fault.errno == errno.EADDRNOTAVAIL:
            reason = "this machine does not have that address"
        super().__init__(f"{key}: can't listen on {address}: {reason}")
        self.key = key
        self.address = address


class TrustError(Exception):
    """A key, token or certificate can't be used; the text names the file and the reason."""


class RegistryUnavailable(Exception):
    """The registry cannot be reached or gives no answer; the text names its URL and the reason."""


class Superseded(Exception):
    """Another process has started with this node_id, so that this incarnation must stop."""


class AddressTaken(Exception):
    """A live tuple of another agent has this address; the text names the agent and its node."""

    def __init__(self, namespace: str, ip: str, agent_id: str, node: str) -> None:
        where = ip if namespace == "default" else f"{ip} of namespace {namespace!r}"
        super().__init__(f"{where} is taken: the agent {agent_id!r} has it, with a session on the node {node!r}")
        self.namespace = namespace
        self.ip = ip
        self.agent_id = agent_id  # the agent that has the address
        self.node = node


def certificate_fault(error: ssl.SSLCertVerificationError) -> str:
    """Return what is wrong with the peer's certificate, and for its dates also this clock."""
    hint = f" ({CHECK_CLOCK})" if error.verify_code in _OF_TIME else ""
    return f"{error.verify_message}{hint}"
