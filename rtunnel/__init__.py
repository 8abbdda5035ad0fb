"""The core of rtunnel, which all roles share and which imports no role.

- `wire`, `relay`, `registry`, `trust`, `config`, `doctor`: packages, whose first lines name their
  modules.
- `cli`, `cli_cluster`, `cli_doctor`, `cli_pki`, `cli_trace`: the command `rtunnel`; `console`: its
  output; `demo`: its demo.
- `roles`: finds, checks and runs roles; `workers`: runs one role in several processes.
- `admin`: health over HTTP; `api`: the paths under `/v1/`, which need a token; `api_client`: asks
  it; `metrics`: the series of `/metrics`.
- `bridge`: calls between trio and the relay's thread.
- `counts`: counts of streams, and permits; `histogram`: counts of durations; `strangers`: places
  for connections without proof.
- `netlink`: interfaces and routes, as the kernel has them; `net`: listening sockets.
- `pulse`: signs of life for systemd and the supervisor; `watch`: files that are read again.
- `events`: what happens to the cluster, published to the registry; `cli_events` shows it.
- `logs`: log lines; `clock`: finds clocks that differ.
- `errors`: errors that several modules share, and exit codes; `compat`: for older Pythons.

docs/architecture.md shows which of them may import which.
"""

__version__ = "0.1.0"
