"""The HTTP service of answers, and its web page.

Belongs here: reading requests, writing answers, routes, metrics, the process that runs them. Does not belong here: what
is recommended (`pipelines.recommend`), how views are kept fresh (`pipelines.indexing`), taking events
(`pipelines.ingest.collector`).
"""
