"""Engine set-up, training loop and callbacks."""
