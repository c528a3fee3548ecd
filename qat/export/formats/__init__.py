"""One file per format; a class here is known by its `name`."""
