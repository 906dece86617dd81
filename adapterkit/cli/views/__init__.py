"""Views of results: tables, curves and plots."""
