"""One target under atheris: `python -m fuzz.one TARGET [libFuzzer's options] CORPUS`. `python -m fuzz` starts it."""

from __future__ import annotations

import sys
import warnings

import atheris

with atheris.instrument_imports(include=["rtunnel", "h11", "tomllib"], enable_loader_override=False):
    from fuzz.targets import TARGETS


def main() -> None:
    """Does not return: the fuzzer ends the process."""
    warnings.simplefilter("ignore")  # of certificates that are odd
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, TARGETS[name].check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
