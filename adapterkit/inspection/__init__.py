"""Facts about adapters and bases: ranks, norms, fit, storage."""
