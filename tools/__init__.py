"""Programs beside training and sampling, each run as `python -m tools.NAME`."""
