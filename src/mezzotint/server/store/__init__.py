"""What outlives a process: the database, API keys, quotas, pictures and adapter files."""
