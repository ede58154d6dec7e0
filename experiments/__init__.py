"""One script for each figure and table; nothing in the library imports them."""
