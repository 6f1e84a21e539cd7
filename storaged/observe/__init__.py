"""What storaged tells those who watch it."""
