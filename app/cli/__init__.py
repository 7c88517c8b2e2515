"""The command line: `pestle`."""
