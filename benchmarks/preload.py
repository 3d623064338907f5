"""What every rank needs, imported once in the process from which ranks are forked. Starts no thread, touches no GPU."""

import torch
import torch.distributed.checkpoint
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.tensor

import dckpt

for _name in dckpt.__all__:
    getattr(dckpt, _name)  # names are resolved on first use; a rank must not pay for that in its first round
