"""Who may talk to whom: the cluster's key, join tokens, certificates, TLS; rules and users of a gateway.

`pki` makes keys and certificates, `keys` reads and uses the symmetric ones, `tls` the certificates. `policy` has the
rules, `users` the names and password hashes.
"""
