"""The schemes: each module holds one as `SCHEME`, and nothing else has to name it."""
