"""What must be true before something is served: expectations of tables, gates of bases, the checks that ask them.

Belongs here: expectations, asset checks, gates. Does not belong here: what is checked (`pipelines`), when (`jobs`).
"""
