"""What a run contains: generations, the line of checkpoints, the commit of one more, the end of old ones."""
