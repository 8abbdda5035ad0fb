"""Files under the eyes of roles that watch them."""

from __future__ import annotations

from pathlib import Path


def put(path: Path, content: str | bytes) -> None:
    """Written as a whole: nobody reads half of it."""
    fresh = path.with_name(f"{path.name}.fresh")
    fresh.write_bytes(content.encode() if isinstance(content, str) else content)
    fresh.replace(path)
