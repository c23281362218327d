"""Many tests on one protocol: plans, steps, tables, figures and the report."""
