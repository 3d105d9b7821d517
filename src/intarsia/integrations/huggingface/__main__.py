"""`python -m intarsia.integrations.huggingface MODULE ARGUMENTS …`: the command of another library, as `lm_eval`, in a
process in which transformers knows Intarsia's models."""

from __future__ import annotations

import runpy
import sys

from intarsia.integrations.huggingface import register


def main() -> None:
    """Run the module that is named first with the arguments behind it."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: python -m intarsia.integrations.huggingface MODULE [ARGUMENTS ...]")
    register()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
