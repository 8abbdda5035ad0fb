"""The data plane: one thread, one epoll loop; everything that happens per stream happens here.

- `relay`: the thread, and the verbs: listen, connect, link, join.
- `loop`: descriptors, timers, run queue, calls from other threads.
- `ends`: what can be joined. A `SocketEnd` is a TCP socket; a `StreamEnd` (in `stream`) is a yamux stream. Before an
  end is joined it *talks*: bytes go to the role's `EndHandler`, a small protocol object, whose answers go out.
- `join`: two ends become a pair; bytes, half-closes and resets flow from one to the other, and are counted.
- `link`: one TCP connection between agent and broker, plain or TLS, carrying yamux; `windows`: how much its peer may
  send ahead.
- `memory`: what a process may hold for streams that stall.
- `lost`: why an end, a link or a session ended, as a type.
- `engine`: TLS 1.3 without a socket; `transport`: how a link's bytes get through its socket, plain or TLS; `tls`: TLS
  for a single connection that looks like a socket.

It imports no role, no registry and no trio. Follow a byte: `ends.SocketEnd` -> `join` -> `link.Link` ->
`wire.yamux`, and back.
"""
