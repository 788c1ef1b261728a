"""One module for each command: `add(subparsers)` declares it, `run(args)` does it and returns the exit code."""
