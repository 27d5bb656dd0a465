"""Engines: what runs the step graph. `protocol` is what the runtime asks of one; `fake` is the one for tests."""
