"""Canvas attention: each token attends to an interval of positions, of the paged K/V pool and of its own row."""
