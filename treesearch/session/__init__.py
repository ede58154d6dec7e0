"""A search under way: waves, budget, record, checks when it is resumed."""
