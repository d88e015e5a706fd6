"""The benchmark suites: `pytest bench` checks every contestant, then times them in turns within one process."""
