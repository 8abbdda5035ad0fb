"""The doctor: finds what is wrong with one machine of a cluster, or with the whole cluster.

- `findings`: a verdict with its text and the fix.
- `facts`: the facts that the checks of one machine judge, as plain values.
- `machine`, `probes`, `redis_facts`: collect these facts.
- `checks`: judge the facts of one machine; pure.
- `cluster`: the facts of the whole cluster, and their checks; pure but for `collect`.
- `bundle`: packs facts and findings into one archive without a secret.
"""
