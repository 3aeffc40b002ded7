"""Users: their timelines, counters and indices."""
