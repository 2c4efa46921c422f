"""Comparing ways to train on tasks and seeds: jobs, their rows on disk, statistics and a report."""
