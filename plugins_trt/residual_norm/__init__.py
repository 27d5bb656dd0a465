"""What a branch adds to the residual stream, and the norms of the sum that the next branches read."""
