"""What the integrations of inference engines share."""
