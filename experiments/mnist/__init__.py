"""Training, sampling and search on MNIST."""
