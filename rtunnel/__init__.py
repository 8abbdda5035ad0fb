"""Shared core of rtunnel; it imports no role."""

__version__ = "0.1.0"
