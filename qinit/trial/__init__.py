"""What stock transformers and PEFT make of a run that was written: its names, its predictions, its gradients."""
