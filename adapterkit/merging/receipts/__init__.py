"""What a merge leaves to be undone and resumed by."""
