"""What every rank needs, imported once in the process from which ranks are forked. Starts no thread, touches no GPU."""

import importlib

import dckpt

for _module in ("checkpoint.state_dict", "fsdp", "tensor"):
    importlib.import_module(f"torch.distributed.{_module}")
for _name in dir(dckpt):
    getattr(dckpt, _name)  # names are resolved on first use; a rank must not pay for that in its first round
