"""Data: reading it, splitting it over clients, and cutting it into batches."""
