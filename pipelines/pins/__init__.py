"""Pins: their documents, features and index."""
