"""The command `dckpt`: one file a command."""
