"""What the command line does, as functions from a storage to records."""
