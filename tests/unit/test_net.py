"""What the kernel knows of a connection, and of this machine's addresses."""

from __future__ import annotations

import socket

from rtunnel.net import is_own, resending, unordered


def test_a_connection_that_works_has_nothing_to_send_again_and_lost_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        taken, _ = server.accept()
        with taken:
            client.sendall(b"x" * 100_000)
            assert taken.recv(1000)
            assert [resending(client), unordered(taken)] == [0, 0]


def test_a_socket_without_a_connection_tells_nothing() -> None:
    """Nor does one of another kind."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        assert [resending(sock), unordered(sock)] == [0, 0]


def test_loopback_and_foreign_addresses_are_no_own_ones() -> None:
    """Documentation addresses (RFC 5737, RFC 3849) are nobody's."""
    assert not any(map(is_own, ("127.0.0.1", "::1", "192.0.2.1", "2001:db8::1")))
