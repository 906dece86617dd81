"""Uploads to the Hub: files checked, card completed, everything in one commit."""
