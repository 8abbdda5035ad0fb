"""The data plane: one thread, one epoll loop; everything that happens per stream happens here.

- `loop`: descriptors, timers, run queue, calls from other threads.
- `ends`: what can be joined. A `SocketEnd` is a TCP socket; a `StreamEnd` (in `stream`) is a yamux stream. Before
  an end is joined it *talks*: bytes go to the role's `Talker`, a small protocol object, and the talker's answers
  go out.
- `link`: one TCP connection between agent and broker, plain or TLS, carrying yamux; `windows`: how much its peer may
  send ahead.
- `join`: two ends become a pair; bytes, half-closes and resets flow from one to the other, and are counted.
- `lost`: why an end, a link or a session ended, as a type.
- `relay`: the thread, and the verbs: listen, connect, link, join.

It knows no role, no registry and no trio. Follow a byte: `ends.SocketEnd` -> `join` -> `link.Link` ->
`wire.yamux`, and back.
"""
