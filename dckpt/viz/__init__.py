"""Text for people: records in, text out. No storage access."""
