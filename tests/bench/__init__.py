"""Side by side: rtunnel and its peers in one run (`make bench`, `make bench-quick`).

Words of this package:

    system      something that carries bytes from a client to the target: `rtunnel-tls`, `frp-plain-socks`, `none`
    deployment  the processes behind one or more systems; all of them run during the whole bench and idle in between
    target      the far end: one process of ours that echoes, swallows or produces bytes, as the first byte asks
    workload    what is done through a system, and which figures come of it
    round       every workload once through every system, in turn; a figure is the median over the rounds
    board       shared memory in which load processes count, so that the bench reads rates as differences of two looks

The CPU time of a figure is that of the system's own processes: all their threads, user and system, in nanoseconds.
On a machine that others use as well it is the steady one.
"""
