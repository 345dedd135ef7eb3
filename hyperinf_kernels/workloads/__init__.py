"""The workloads of the papers: reading rows, the demo data, detection metrics, experiments."""
