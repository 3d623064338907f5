"""Between torch and the format: chunks of tensors, verified reads into tensors, and the plug-ins for stock `dcp.save`."""
