"""Where bytes live: one narrow interface, `Storage`, and the file systems and stores behind it."""
