"""Where the desired state is kept."""
