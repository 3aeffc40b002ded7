"""The HTTP service that answers from base and delta."""
