"""Settings: frozen dataclasses from tables, read in one way and with one form of error.

`read` makes a dataclass of a mapping, as TOML, JSON and the command line give them. Every name must be known, every
value of the declared type, nested tables included; an `OptionError` says where the option stands (`arms[1].preset`),
what was found and what was probably meant, and whoever knows the file adds the line (`settings.toml.line_of`).
`settle_types` holds the same rules for what is made by a constructor, and `check_bounds` those of numbers.

Written here and not taken from a library: of those that were looked at (pydantic, msgspec, cattrs, dacite, OmegaConf)
none tells a near name and the line of the file, most turn text into numbers or stop at the class that raises, and a
dependency of the ground floor is one of everything.
"""

from intarsia.settings.bounds import check_bounds
from intarsia.settings.reading import Readers, check_names, convert, describe, read, settle_types
from intarsia.settings.tables import merge, with_none, without_none

__all__ = [
    "Readers",
    "check_bounds",
    "check_names",
    "convert",
    "describe",
    "merge",
    "read",
    "settle_types",
    "with_none",
    "without_none",
]
