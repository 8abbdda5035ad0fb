"""Sans-I/O protocols: bytes in, events out. Nothing in here knows sockets, TLS, threads or trio.

- `refusal`: every reason for which a stream or a session is not granted, and how each is told.
- `messages`: the MessagePack messages of control streams, and Dial and its answers.
- `control`: both ends of a control stream as state machines.
- `dial`: both ends of a Dial as state machines.
- `yamux`: the framing of a link (hashicorp's spec).
- `socks5`, `http`: what a gateway's clients speak; `http_response`, `http_body`: answers, and where bodies end.
"""
