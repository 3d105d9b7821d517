"""Models on disk. `native` is Intarsia's own format."""
