"""What a branch adds to the residual stream, and the norms of the sum that the next branches read."""

from __future__ import annotations

MOST_NORMS = 3
"""Norms of one sum that the operation makes."""
