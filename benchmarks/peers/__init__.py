"""The same jobs done by other tools, as their documentation does them."""
