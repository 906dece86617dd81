"""What is sent to the Hub: checked, described, and committed at once."""
