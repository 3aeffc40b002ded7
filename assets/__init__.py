"""Dagster assets, a module a layer, thin: read, call what `pipelines` computes, write, say what was written.

An asset's key is its table's name, its group the layer. Does not belong here: computation (`pipelines`), checks
(`quality`), schedules and the command line (`jobs`).
"""
