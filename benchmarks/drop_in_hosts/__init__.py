"""One file per host: `measure(quick)` yields stock and drop-in on the same data."""
