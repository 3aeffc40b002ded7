"""What must be true before something is served: audits of tables, gates of bases, the checks that ask them.

Belongs here: measuring tables, judging the measures, gates, asset checks, pages. Does not belong here: what tables must
be (`pipelines.suites`), what is checked (`pipelines`), when (`jobs`).
"""
