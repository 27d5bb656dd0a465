"""Checkpoints that the repository ships, and the recipes that made them."""
