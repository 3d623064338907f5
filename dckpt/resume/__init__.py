"""Is it right to continue from this checkpoint? Facts, the report, and (in later versions) the full validator."""
