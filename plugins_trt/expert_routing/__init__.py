"""Expert routing: router logits to the ids and weights of the top-k experts of each token."""
