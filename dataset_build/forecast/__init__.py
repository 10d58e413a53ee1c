"""What a build will consist of, before it is begun: for `python -m pipeline plan`."""
