"""`torch.distributed` through a parameter store: importing this registers the backend "smlt"."""
