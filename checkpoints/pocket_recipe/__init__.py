"""How the pocket checkpoint is made: its tasks, tokenizer, data, training and export, see README.md."""

from __future__ import annotations
