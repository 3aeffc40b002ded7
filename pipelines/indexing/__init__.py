"""The heart: facts, their one merge, bases, deltas, overlays and views.

Belongs here: whatever is true of every index. Does not belong here: anything that knows what a pin, a user or an
ad is (those declare an ``IndexSpec`` elsewhere), and anything that knows Dagster.
"""
