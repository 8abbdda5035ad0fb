"""Replacements for what the oldest supported Python lacks."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if sys.version_info >= (3, 12):
    from typing import override
elif TYPE_CHECKING:
    from typing_extensions import override
else:

    def override(method):
        """Mark a method whose contract is its base's. Return it as it is."""
        return method


__all__ = ["override"]
