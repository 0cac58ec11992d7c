"""Support for any long run, whatever it computes."""
