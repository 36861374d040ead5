"""Worker processes: how they start, how they are watched, and when they are restarted."""
