"""The lab: isolated VPCs in network namespaces, a real L4 VIP, real processes, real clients (docs/lab.md)."""
