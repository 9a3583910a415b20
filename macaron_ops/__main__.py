"""`python -m macaron_ops` is the command `macaron-ops`."""

from macaron_ops.cli import main

raise SystemExit(main())
