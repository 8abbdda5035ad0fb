"""Who may talk to whom: keys, join tokens, certificates, trust lists, proofs, TLS; rules and users of a gateway.

- `keys`: the symmetric ones: join tokens, cluster key, gateways' keys, MACs and nonces.
- `certificates`: X.509: CAs, the certificates that they issue, and requests for them.
- `identity`: whose a certificate is and whether it is good; the trust store and trust lists.
- `proof`: an agent's proofs over Dials, and keys of pairs.
- `tls`: TLS contexts from certificates and CAs.
- `follower`: keeps a process's trust store current, by the authority and by files.
- `files`: files that are written whole or not at all.
- `pki`, `store`: the authority's directory, and its SQLite store.
- `authority`: what the authority decides about requests for certificates.
- `policy`, `users`: a gateway's rules; names and password hashes.
"""
