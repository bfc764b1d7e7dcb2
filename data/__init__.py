"""Datasets: the batch loader, the tokenizers, and one folder per dataset with its prepare.py."""
