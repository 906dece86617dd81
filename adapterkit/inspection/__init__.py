"""What adapters and bases can be asked: ranks, norms, fit, storage."""
