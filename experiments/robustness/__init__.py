"""What breaks it: damaged folders, other processors, killed workers."""
