"""Other libraries' interfaces over Intarsia's operators: `intarsia.compat.fla`."""
