"""Sans-I/O protocols: bytes in, events out. This package uses no socket, TLS, thread or trio.

- `refusal`: all reasons for refusals, and the reply for each.
- `messages`: the MessagePack messages of control streams, and Dial and its answers.
- `states`: the transition tables of state machines.
- `control`: both ends of a control stream as state machines.
- `dial`: both ends of a Dial as state machines.
- `yamux`: the framing of a link (hashicorp's spec).
- `socks5`, `http`: the protocols of a gateway's clients.
- `http_response`, `http_body`: targets' answers, and the ends of bodies.
"""
