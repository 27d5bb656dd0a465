"""Linear layer whose weight is stored in 8-bit floating point with one scale an output channel."""
