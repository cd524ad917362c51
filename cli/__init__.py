"""Command line: options to configuration, stage function, output, exit code."""
