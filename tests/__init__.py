"""The tests; a folder is a marker (unit, properties, integration, faults, browser)."""
