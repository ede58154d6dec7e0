"""Speed and exactness of the library itself."""
