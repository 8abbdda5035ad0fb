"""Who may talk to whom: the cluster's key, join tokens, certificates, TLS.

`pki` makes them, `keys` reads and uses the symmetric ones, `tls` the certificates.
"""
