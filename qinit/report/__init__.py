"""What a run says of itself: report, model card, pictures, and the files beside its tensors."""
