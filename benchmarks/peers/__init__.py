"""The same jobs with other tools, as in their documentation."""
