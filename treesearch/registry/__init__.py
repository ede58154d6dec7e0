"""Names and expressions of the command line and of plug-ins to objects."""
