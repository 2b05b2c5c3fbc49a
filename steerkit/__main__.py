"""`python -m steerkit`: the same as the command `steerkit`."""

from steerkit.cli import main

raise SystemExit(main())
