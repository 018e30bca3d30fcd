"""DeepSpeed's tags of any ZeRO stage and layout."""
