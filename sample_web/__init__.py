"""The embedded default: a small made-up web, from encyclopedia dump to picture server, by seed."""
