"""A recipe over a folder, resumable: a run, a sweep, or a scaling study."""
