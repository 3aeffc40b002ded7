"""Recommendation: item vectors, folding a user in, candidates and their order, evaluation, the registry of models.

Belongs here: what is recommended and how good it is, on Spark and in plain numpy. Does not belong here: HTTP
(`pipelines.serving`) and how indices are kept (`pipelines.indexing`).
"""
