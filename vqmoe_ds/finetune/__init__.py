"""Fine-tuning of pretrained models: labelled texts, and plain text of another domain."""
