"""Who may talk to whom: keys, join tokens, certificates, trust lists, proofs, TLS; rules and users of a gateway.

`pki` makes keys and certificates, `keys` reads and uses the symmetric ones, `tls` the certificates, and `identity` says
whose they are and whether they are good. `policy` has the rules, `users` the names and password hashes.
"""
