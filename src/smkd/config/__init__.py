"""What a run is: the schema of its configuration and the recipes that fill it in."""
