"""Known faults, one after the other, and the one command that names each: `make night`."""
