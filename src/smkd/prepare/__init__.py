"""From published archives to `<root>/<train|val|test>/<class>/<image>` and `dataset.json`."""
