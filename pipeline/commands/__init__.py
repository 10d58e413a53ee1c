"""What the command line's words do; only here and in `recipe` does the core look at the stages."""
