"""One script per experiment that answers a claim, its finding on top."""
