"""Tools of operators: doctor, plan, startup, load test."""
