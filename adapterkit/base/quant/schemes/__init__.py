"""The schemes: each module defines one as `SCHEME`, which registers it."""
