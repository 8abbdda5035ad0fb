"""Trust between processes: keys, tokens, certificates, trust lists, proofs, TLS, gateways' rules.

- `keys`: symmetric secrets: join tokens, cluster keys, gateways' keys, MACs and nonces.
- `certificates`: X.509: CAs, the certificates that they issue, and requests for them.
- `identity`: checks certificates; the trust store and trust lists.
- `proof`: proofs that the target's own agent has answered a Dial; keys of pairs.
- `tls`: TLS contexts from certificates and CAs.
- `follower`: keeps a process's trust store current, by the authority and by files.
- `files`: writes files atomically.
- `pki`, `store`: the authority's directory, and its SQLite store.
- `authority`: decides requests for certificates.
- `policy`, `users`: the rules of a gateway; its users and password hashes.
"""
