"""Ads: the account's tables, the repository of their rows, enrichment, and the index."""
