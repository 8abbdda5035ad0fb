"""The data plane: one thread, one epoll loop; all that happens per stream happens here.

- `loop`: descriptors, timers, run queue, calls from other threads.
- `ends`: what can be joined, and how a role's `EndHandler` uses an end before that. A `SocketEnd`
  is a TCP connection.
- `stream`: a `StreamEnd`, a yamux stream as an end; `windows`: how much a link's peer may send
  ahead; `memory`: how much one relay may hold for all its streams.
- `engine`: TLS without a socket; `tls`: a TCP connection under TLS as an end.
- `link`: one TCP connection between agent and broker that carries yamux; `transport`: its bytes,
  plain or under TLS.
- `join`: two ends become a pair; bytes, half-closes and resets pass between them, and are counted.
  `socketpair`: two sockets; `streampair`: a socket and a stream.
- `lost`: why an end, a link or a session ended, as a type.
- `relay`: the thread, and what a role asks of it: listen, connect, link, join.

`loop`, `ends`, `tls`, `link`, `join` and `rtunnel.wire.yamux` each begin with a theory of
operation: what FIN, RST and HUP become, where bytes wait, and what may call back. To find why a
stream was reset, begin with the ending in its account and the table in `join`, then see `link`.

The package knows no role, no registry and no trio. Follow a byte: `ends.SocketEnd` -> `join` ->
`link.Link` -> `wire.yamux`, and back.
"""
