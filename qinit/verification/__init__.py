"""A finished run reread: what is no longer as it was written, or as its report says."""
