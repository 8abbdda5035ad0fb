"""Starts the authority role in the core's runner."""

from __future__ import annotations

import trio

from rtunnel import admin
from rtunnel.config import Config
from rtunnel.registry import Registry
from rtunnel.roles import Role
from rtunnel_authority.server import Server


async def serve(
    config: Config,
    registry: Registry | None,
    *,
    stop: trio.Event,
    task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run the authority until `stop`. Calls `started` when it accepts connections."""
    server = Server(config.authority)
    try:
        await admin.run_beside(
            server,
            config.authority.admin,
            key="authority.admin",
            status=server.status,
            stop=stop,
            task_status=task_status,
        )
    finally:
        server.close()


ROLE = Role(name="authority", help="Give agents certificates; has the CA's key.", serve=serve, needs_registry=False)
