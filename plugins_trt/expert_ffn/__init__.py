"""Expert feed-forward: the weighted sum of the gated feed-forward networks of each token's experts."""
