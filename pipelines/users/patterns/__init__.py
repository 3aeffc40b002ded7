"""Patterns: rules over a user's events, and the index `user_profiles` of what fired.

Belongs here: what decides which rule fires when, and nothing else: this package is the index's lineage. Reading rules
from a file is `users.pattern_files`, reading what fired `users.profiles`, asking history `users.pattern_dry_run`.
"""
