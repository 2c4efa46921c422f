"""This package compares ways to train on tasks and seeds: its jobs, their rows on disk, statistics and a report."""
