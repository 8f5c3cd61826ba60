"""Repositories of patches, on the Hub or in a mirror: fetching, publishing, channels, following."""
