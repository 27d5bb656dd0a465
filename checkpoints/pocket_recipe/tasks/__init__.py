"""The checkable tasks of the pocket checkpoint: prompts whose one right answer a program knows.

Each task draws operands, phrases a request about them in one of several ways and computes the answer.
"""

from __future__ import annotations

from checkpoints.pocket_recipe.tasks import arithmetic, digits, letter_case, lists, lookups, records, tables
from checkpoints.pocket_recipe.tasks.example import HELD_OUT_SHARE, Example, Task, correct, draw, held_out

__all__ = ["HELD_OUT_SHARE", "TASKS", "Example", "Task", "correct", "draw", "held_out"]

TASKS: tuple[Task, ...] = (
    Task("add", arithmetic.add, share=1.5),
    Task("subtract", arithmetic.subtract),
    Task("add_in_words", arithmetic.add_in_words, share=8.0),
    Task("gain", arithmetic.gain),
    Task("loss", arithmetic.loss, share=1.5),
    Task("compare", arithmetic.compare, share=3.0),
    Task("spell_number", digits.spell_number, share=2.0),
    Task("read_number", digits.read_number),
    Task("reverse_digits", digits.reverse_digits),
    Task("sort_numbers", lists.sort_numbers, share=10.0),
    Task("sort_words", lists.sort_words, share=12.0),
    Task("reverse_words", lists.reverse_words),
    Task("nth_word", lists.nth_word),
    Task("count_words", lists.count_words),
    Task("upper_case", letter_case.upper_case),
    Task("lower_case", letter_case.lower_case),
    Task("title_case", letter_case.title_case),
    Task("json", records.as_json),
    Task("table", tables.table),
    # Shares of 17 in 62 over two runs taught no look-up: chance remained.
    Task("lookup", lookups.lookup, promised=False),
    Task("several_lookups", lookups.several_lookups, promised=False),
    Task("table_lookup", lookups.table_lookup, promised=False),
    Task("then_add", arithmetic.then_add, follow_up=True, share=2.0),
    Task("then_field", records.then_field, follow_up=True),
    Task("then_lookup", lookups.then_lookup, follow_up=True, promised=False),
    Task("then_reverse", lists.then_reverse, follow_up=True),
    Task("then_sort", lists.then_sort, follow_up=True, share=16.0),
    Task("then_upper", lists.then_upper, follow_up=True),
    Task("then_nth", lists.then_nth, follow_up=True),
    Task("then_count", lists.then_count, follow_up=True),
)
