"""`python -m steerkit`: the same as the command `steerkit`."""

from steerkit.lab.cli import main

raise SystemExit(main())
