"""Norms and rotation of the heads that attention reads, in one operation."""
