"""The library, its files as they are in its repository but for `_ops` and `outside`."""
