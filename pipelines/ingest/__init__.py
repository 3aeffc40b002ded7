"""From topics and files to raw tables: broker, producer, collector, archive stream, loads, dead letters."""
