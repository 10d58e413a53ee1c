"""What a run is: stages, tasks, manifests and the loop that advances them.

Nothing here knows of images, text or GPUs.
"""
