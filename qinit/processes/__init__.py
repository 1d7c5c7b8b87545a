"""The processes of one run, by torch.distributed."""
