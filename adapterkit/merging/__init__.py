"""Adapters into a base: plan, blocks, receipts, run; verified, undone, or in a live model."""
