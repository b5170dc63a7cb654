"""The front door: command line, simulated federation, reports."""
