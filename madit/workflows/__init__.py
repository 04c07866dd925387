"""What strings the stages together: doctor, demo, report."""
