"""Graph passes: FX graph in, FX graph out. ``pipeline.py`` lists them in order."""
